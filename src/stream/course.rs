//! Which indices a rank gets, as arithmetic on the delivery.

use super::cursor::Cursor;
use super::delivery::{Delivery, LastBatch};
use super::{Resolved, StreamError};

/// The largest batch.
const MAX_BATCH: u32 = 64;
/// The largest index or count a client may name: far beyond any run, far below an overflow.
const MAX_INDEX: u64 = 1 << 48;
/// The largest world.
const MAX_WORLD: u32 = 1 << 16;

/// Checks a delivery against the recipe that it is of, as opening a stream does.
///
/// # Errors
/// [`StreamError`] names the field of the delivery or cursor.
pub fn check_delivery(resolved: &Resolved, delivery: &Delivery) -> Result<(), StreamError> {
    Course::new(resolved, delivery).map(drop)
}

/// Returns the index that a stream of a delivery begins with; where it has no batch, because all that is left of the epoch is
/// dropped, the one to go on with.
///
/// # Errors
/// [`StreamError`] names the field of the delivery or cursor.
pub fn first_index(resolved: &Resolved, delivery: &Delivery) -> Result<u64, StreamError> {
    Ok(Course::new(resolved, delivery)?.start(0))
}

/// The indices of one rank, step after step. A rank's n-th patch has the ordinal n.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Course {
    rank: u64,
    world: u64,
    batch: u64,
    from: u64,
    steps: u64,
    /// The index before which the last step ends, whatever the batch size; no such index where steps are full.
    end: u64,
    /// Where to go on after the last step, where it is not the next index: indices at an epoch's end may be dropped.
    next: Option<u64>,
}

/// Returns where a run goes on that ends where an epoch has no whole step left; wherever it began, so that who went on after an
/// outage goes on where the others do.
fn after_the_dropped(from: u64, steps: u64, step: u64, epoch: u64) -> Option<u64> {
    let end = from.saturating_add(steps.saturating_mul(step));
    let left = epoch - end % epoch;
    let is_over = left < step && (left < epoch || steps == 0);
    is_over.then(|| end.saturating_add(left))
}

impl Course {
    /// Checks a delivery against a recipe.
    ///
    /// # Errors
    /// [`StreamError`] names the field of the delivery or cursor.
    pub(super) fn new(resolved: &Resolved, delivery: &Delivery) -> Result<Self, StreamError> {
        check(delivery)?;
        let from = match &delivery.cursor {
            None => delivery.from,
            Some(cursor) => {
                check_cursor(resolved, cursor)?;
                cursor.next_index
            }
        };
        if from > MAX_INDEX {
            return refuse("from", format!("at most {MAX_INDEX}"), from);
        }
        let (world, batch) = (u64::from(delivery.world), u64::from(delivery.batch_size));
        let epoch = resolved.patches_per_epoch;
        let left = epoch - from % epoch;
        let to_the_end = match delivery.last_batch {
            LastBatch::Fill | LastBatch::Partial => left.div_ceil(world * batch),
            LastBatch::Drop => left / (world * batch),
        };
        let asked = delivery.count.unwrap_or(to_the_end);
        let is_partial = delivery.last_batch == LastBatch::Partial;
        let drops = delivery.last_batch == LastBatch::Drop;
        Ok(Self {
            rank: u64::from(delivery.rank),
            world,
            batch,
            from,
            steps: if is_partial { asked.min(to_the_end) } else { asked },
            end: if is_partial { from + left } else { u64::MAX },
            next: if drops {
                after_the_dropped(from, asked, world * batch, epoch)
            } else {
                None
            },
        })
    }

    /// Tells whether a patch of this rank's is the first of a batch.
    pub(super) fn is_first_of_batch(&self, ordinal: u64) -> bool {
        ordinal.is_multiple_of(self.batch)
    }

    /// Returns how many batches every rank gets.
    pub(super) fn steps(&self) -> u64 {
        self.steps
    }

    /// Returns how many patches this rank gets.
    pub(super) fn patches(&self) -> u64 {
        let full = self.steps.saturating_sub(1).saturating_mul(self.batch);
        full.saturating_add(self.steps.checked_sub(1).map_or(0, |last| self.patches_in(last)))
    }

    /// Returns how many patches this rank gets in a step.
    pub(super) fn patches_in(&self, step: u64) -> u64 {
        let left = self.end.saturating_sub(self.start(step).saturating_add(self.rank));
        left.div_ceil(self.world).min(self.batch)
    }

    /// Returns the index of this rank's n-th patch.
    pub(super) fn index(&self, ordinal: u64) -> u64 {
        self.start(ordinal / self.batch) + ordinal % self.batch * self.world + self.rank
    }

    /// Returns which of this rank's patches has an index; nothing where none has.
    pub(super) fn ordinal(&self, index: u64) -> Option<u64> {
        let (past, stride) = (index.checked_sub(self.from)?, self.world * self.batch);
        let (step, within) = (past / stride, past % stride);
        let is_ours = within % self.world == self.rank && step < self.steps && index < self.end;
        is_ours.then(|| step * self.batch + within / self.world)
    }

    /// Returns the first index of a step; after the last step, where to go on.
    pub(super) fn start(&self, step: u64) -> u64 {
        if let Some(next) = self.next.filter(|_| step >= self.steps) {
            return next;
        }
        let past = step.saturating_mul(self.world * self.batch);
        self.from.saturating_add(past).min(self.end)
    }

    /// Returns a step's position in the run.
    pub(super) fn position(&self, step: u64) -> u64 {
        self.start(step) / (self.world * self.batch)
    }
}

fn refuse<T>(field: &'static str, expected: String, got: impl ToString) -> Result<T, StreamError> {
    let got = got.to_string();
    Err(StreamError::Delivery { field, expected, got })
}

fn check(delivery: &Delivery) -> Result<(), StreamError> {
    let Delivery {
        batch_size,
        world,
        rank,
        ..
    } = *delivery;
    if !(1..=MAX_BATCH).contains(&batch_size) {
        return refuse("batch_size", format!("1 to {MAX_BATCH}"), batch_size);
    }
    if !(1..=MAX_WORLD).contains(&world) {
        return refuse("world", format!("1 to {MAX_WORLD}"), world);
    }
    if rank >= world {
        return refuse("rank", format!("0 to {}, below world", world - 1), rank);
    }
    match delivery.count {
        Some(count) if !(1..=MAX_INDEX).contains(&count) => {
            refuse("count", format!("1 to {MAX_INDEX}, or absent"), count)
        }
        _ => Ok(()),
    }
}

fn check_cursor(resolved: &Resolved, cursor: &Cursor) -> Result<(), StreamError> {
    let server = resolved.cursor(cursor.next_index);
    let fields = [
        ("recipe", cursor.recipe.to_string(), server.recipe.to_string()),
        ("snapshot", cursor.snapshot.to_string(), server.snapshot.to_string()),
        ("revision", cursor.revision.to_string(), server.revision.to_string()),
    ];
    for (field, cursor, server) in fields {
        if cursor != server {
            return Err(StreamError::CursorMismatch { field, cursor, server });
        }
    }
    if cursor.bundle != server.bundle {
        return Err(StreamError::BundleGone(cursor.bundle));
    }
    Ok(())
}

/// Courses for other modules' tests.
#[cfg(test)]
pub(super) fn course(rank: u64, world: u64, batch: u64, from: u64, steps: u64) -> Course {
    Course {
        rank,
        world,
        batch,
        from,
        steps,
        end: u64::MAX,
        next: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;
    use crate::stream::recipe::Recipe;
    use crate::volume::LabelMap;
    use proptest::prelude::*;

    fn resolved() -> Resolved {
        Resolved {
            recipe: Recipe::default(),
            hash: Digest::default(),
            snapshot: Digest::default(),
            bundle: Digest::default(),
            models: None,
            revision: 1,
            patches_per_epoch: 1,
            patch: [16; 3],
            labels: LabelMap::default(),
            feasible: Default::default(),
            shortfall: Vec::new(),
            numerics: String::new(),
        }
    }

    #[test]
    fn a_delivery_outside_its_ranges_is_refused_by_field() {
        let refused = |change: fn(&mut Delivery)| {
            let mut delivery = Delivery::default();
            change(&mut delivery);
            check(&delivery).unwrap_err().to_string()
        };
        assert_eq!(
            refused(|delivery| (delivery.rank, delivery.world) = (2, 2)),
            "delivery field rank: expected 0 to 1, below world, got 2"
        );
        assert_eq!(
            refused(|delivery| delivery.world = 0),
            "delivery field world: expected 1 to 65536, got 0"
        );
        assert_eq!(
            refused(|delivery| delivery.batch_size = 65),
            "delivery field batch_size: expected 1 to 64, got 65"
        );
        assert_eq!(
            refused(|delivery| delivery.count = Some(0)),
            "delivery field count: expected 1 to 281474976710656, or absent, got 0"
        );
    }

    #[test]
    fn ranks_share_each_step_without_gap_or_repeat() {
        for (world, batch) in [(1, 1), (2, 3), (3, 2), (5, 4)] {
            let mut seen: Vec<u64> = (0..world)
                .flat_map(|rank| {
                    let course = course(rank, world, batch, 10, 4);
                    (0..4 * batch).map(move |n| course.index(n))
                })
                .collect();
            seen.sort_unstable();
            assert_eq!(seen, (10..10 + 4 * world * batch).collect::<Vec<_>>());
        }
        // Within a step the ranks are strided.
        assert_eq!(course(1, 2, 2, 0, 1).index(1), 3);
    }

    #[test]
    fn dropped_indices_are_passed_over_also_by_who_goes_on_after_an_outage() {
        let resolved = Resolved {
            patches_per_epoch: 11,
            ..resolved()
        };
        let course = |from, count| {
            let delivery = Delivery {
                world: 2,
                batch_size: 2,
                last_batch: LastBatch::Drop,
                from,
                count,
                ..Delivery::default()
            };
            Course::new(&resolved, &delivery).unwrap()
        };
        // Two steps of four; three indices are dropped.
        let whole = course(0, None);
        assert_eq!((whole.steps(), whole.start(1), whole.start(2)), (2, 4, 11));
        let rest = course(4, Some(1));
        assert_eq!((rest.steps(), rest.start(1)), (1, 11));
        // Who asks for less stands where the next step begins.
        assert_eq!(course(0, Some(1)).start(1), 4);
        // Over an epoch's end, with and without an outage: 15 steps end at 60 of 66, where a whole step is left; 16 at 64.
        assert_eq!((course(0, Some(15)).start(15), course(32, Some(7)).start(7)), (60, 60));
        assert_eq!((course(0, Some(16)).start(16), course(32, Some(8)).start(8)), (66, 66));
        // Where no batch is left, the next epoch.
        assert_eq!((course(8, None).steps(), course(8, None).start(0)), (0, 11));
    }

    proptest! {
        /// A partial last step: as many batches on every rank, every index of the epoch once, and the cursor at its end.
        #[test]
        fn a_partial_epoch_is_tiled(world in 1u64..6, batch in 1u64..5, from in 0u64..20, left in 1u64..50) {
            let (end, steps) = (from + left, left.div_ceil(world * batch));
            let mut seen = Vec::new();
            for rank in 0..world {
                let course = Course { rank, world, batch, from, steps, end, next: None };
                let sizes: u64 = (0..steps).map(|step| course.patches_in(step)).sum();
                prop_assert_eq!(sizes, course.patches());
                prop_assert_eq!(course.start(steps), end);
                for ordinal in 0..course.patches() {
                    prop_assert_eq!(course.ordinal(course.index(ordinal)), Some(ordinal));
                    seen.push(course.index(ordinal));
                }
            }
            seen.sort_unstable();
            prop_assert_eq!(seen, (from..end).collect::<Vec<_>>());
        }

        #[test]
        fn ordinals_and_indices_are_inverse(rank in 0u64..4, more in 1u64..4, batch in 1u64..5, at in 0u64..200) {
            let course = course(rank, rank + more, batch, 7, 10);
            match course.ordinal(at) {
                Some(ordinal) => prop_assert_eq!(course.index(ordinal), at),
                None => prop_assert!((0..course.patches()).all(|ordinal| course.index(ordinal) != at)),
            }
        }
    }
}

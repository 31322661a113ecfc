//! How far each stream may be ahead of its reader, and who gives room back to whom.
//!
//! Everybody may be ahead by one; what is beyond that is shared equally among those who read. Who stalls keeps what lies
//! ready for it until somebody else needs the room: then the patch that it would read last is taken back, and made again
//! once its reader comes (equal, by promise P1). All are patches of the plan's size: a larger one counts as several.

use super::fair::Weights;

/// What bounds the memory, and who gets which share.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Patches that one stream may be ahead of its reader.
    pub(super) window: usize,
    /// Patches that all streams together may be ahead, beside one for each.
    pub(super) max_patches: usize,
    /// Patches kept for streams of the same recipe that are behind, in all.
    pub(super) share_patches: usize,
    pub(super) weights: Weights,
}

/// The longest pause that counts as usual, in turnovers: who validated once may stall the next time.
const LONGEST_PAUSE: u64 = 64;

/// How far a stream has asked, and how far and when it was read.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Progress {
    /// As how many patches of the plan's size one of its counts; 0 is 1.
    pub(super) room: u64,
    pub(super) asked: u64,
    pub(super) taken: u64,
    /// Whether its reader has come at all.
    pub(super) is_reading: bool,
    /// Whether its reader is there now.
    pub(super) is_waiting: bool,
    /// How many patches all readers together had taken when this one last did.
    last_read: u64,
    /// How many the others took between its last batch and the one before.
    pause: u64,
}

impl Progress {
    /// Of a stream whose patches count as so many of the plan's size.
    pub(super) fn of(room: u64) -> Self {
        Self {
            room,
            ..Self::default()
        }
    }

    /// Its reader comes for a patch, the first of a batch or another; `reads` is how many all readers together have taken.
    pub(super) fn comes(&mut self, reads: u64, is_first: bool) {
        if is_first && self.taken > 0 {
            self.pause = reads - self.last_read;
        }
        self.is_reading = true;
        self.is_waiting = true;
    }

    /// Its reader leaves with a patch; `reads` is how many all readers together have taken.
    pub(super) fn reads(&mut self, reads: u64) {
        self.is_waiting = false;
        self.taken += 1;
        self.last_read = reads;
    }

    /// Returns how many patches the stream is ahead of its reader.
    pub(super) fn ahead(&self) -> u64 {
        self.asked - self.taken
    }

    fn room(&self) -> u64 {
        self.room.max(1)
    }
}

/// How the room is shared at a moment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    /// Patches beyond its first that a stream may be ahead whose reader goes on, whatever their size.
    most_beyond: u64,
    /// The room of these.
    share: u64,
    /// What is left of the room beyond everybody's first patch.
    left: u64,
    /// Whether some stream's next patch does not fit into that.
    pub(super) is_tight: bool,
    reads: u64,
    /// As many patches as there may be in all.
    turnover: u64,
}

impl Room {
    /// Returns how the streams share the room after `reads` patches.
    pub(super) fn of<'a>(limits: &Limits, streams: impl Iterator<Item = &'a Progress> + Clone, reads: u64) -> Self {
        let max_patches = limits.max_patches as u64;
        let mut room = Self {
            most_beyond: (limits.window as u64).saturating_sub(1),
            share: 0,
            left: 0,
            is_tight: true,
            reads,
            turnover: max_patches + streams.clone().count() as u64,
        };
        let active = streams.clone().filter(|stream| room.is_active(stream)).count() as u64;
        let beyond = |stream: &Progress| stream.ahead().saturating_sub(1).saturating_mul(stream.room());
        let used = streams.clone().map(beyond).fold(0, u64::saturating_add);
        room.share = max_patches / active.max(1);
        room.left = max_patches.saturating_sub(used);
        room.is_tight = streams
            .map(Progress::room)
            .max()
            .is_some_and(|largest| largest > room.left);
        room
    }

    /// Tells whether a stream's reader goes on: not where others have meanwhile read all that there may be, and twice what they read
    /// between its last two batches.
    fn is_active(&self, stream: &Progress) -> bool {
        let usual = self.turnover.max(2 * stream.pause.min(LONGEST_PAUSE * self.turnover));
        let has_stalled = !stream.is_waiting && self.reads - stream.last_read > usual;
        stream.is_reading && !has_stalled
    }

    fn part(&self, stream: &Progress) -> u64 {
        match self.is_active(stream) {
            true => 1 + self.most_beyond.min(self.share / stream.room()),
            false => 1,
        }
    }

    /// Tells whether a stream may ask for a patch as things are.
    pub(super) fn has_room(&self, stream: &Progress) -> bool {
        stream.ahead() == 0 || stream.room() <= self.left
    }

    /// Tells whether a stream holds less than its part.
    pub(super) fn is_due(&self, stream: &Progress) -> bool {
        stream.is_reading && stream.ahead() < self.part(stream)
    }

    /// Returns how many patches a stream holds above its part.
    pub(super) fn surplus(&self, stream: &Progress) -> u64 {
        stream.ahead().saturating_sub(self.part(stream))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn limits(window: usize, max_patches: usize) -> Limits {
        Limits {
            window,
            max_patches,
            share_patches: 0,
            weights: Weights::default(),
        }
    }

    fn progress(ahead: u64, is_waiting: bool, last_read: u64) -> Progress {
        Progress {
            room: 1,
            asked: ahead,
            taken: 0,
            is_reading: true,
            is_waiting,
            last_read,
            pause: 0,
        }
    }

    #[test]
    fn who_pauses_no_longer_than_usual_has_not_stalled() {
        let mut stream = Progress::default();
        let is_active =
            |stream: &Progress, reads| Room::of(&limits(8, 10), [stream].into_iter(), reads).is_active(stream);
        stream.comes(0, true);
        stream.reads(1);
        assert!(is_active(&stream, 12) && !is_active(&stream, 13));
        // Its pause between batches is 40 patches of others; what it pauses within a batch is not.
        stream.comes(41, true);
        stream.reads(42);
        stream.comes(42, false);
        stream.reads(43);
        assert!(is_active(&stream, 43 + 80) && !is_active(&stream, 43 + 81));
    }

    #[test]
    fn who_has_not_read_for_a_turnover_has_stalled_unless_it_waits() {
        let streams = [progress(5, false, 0), progress(0, true, 0), progress(2, false, 60)];
        let stalled = |reads| {
            let room = Room::of(&limits(8, 10), streams.iter(), reads);
            streams.map(|stream| !room.is_active(&stream))
        };
        assert_eq!(stalled(60), [true, false, false]);
        assert_eq!(stalled(73), [true, false, false]);
        assert_eq!(stalled(74), [true, false, true]);
        let room = Room::of(&limits(8, 10), streams.iter(), 60);
        // Two are active, so each has a part of 1 + 10 / 2; the one that stalled holds four above its own of one.
        assert_eq!((room.part(&streams[1]), room.surplus(&streams[0])), (6, 4));
        assert!(room.is_due(&streams[1]) && room.is_due(&streams[2]) && !room.is_due(&streams[0]));
    }

    #[test]
    fn a_large_patch_takes_the_room_of_several() {
        let large = Progress {
            room: 4,
            ..progress(2, true, 0)
        };
        let small = progress(4, true, 0);
        let room = Room::of(&limits(8, 10), [large, small].iter(), 0);
        // Of 10 each has 5: one large patch beyond the first, or five small ones. Used are 4 and 3, and a large one has no place.
        assert_eq!((room.part(&large), room.part(&small)), (2, 6));
        assert!(room.has_room(&small) && !room.has_room(&large) && room.is_tight);
        let first = Progress { asked: 0, ..large };
        assert!(room.has_room(&first), "everybody may be ahead by one");
    }

    proptest! {
        /// Where the room is used up and a stream that is ahead holds less than its part, another holds more than its own.
        #[test]
        fn whoever_is_due_finds_somebody_with_a_surplus(
            streams in prop::collection::vec((0u64..12, any::<bool>(), 0u64..300, 0u64..9), 1..40),
            window in 1usize..10, max_patches in 1usize..40,
        ) {
            let of = |(ahead, waits, last, room)| Progress { room, ..progress(ahead, waits, last) };
            let streams: Vec<Progress> = streams.into_iter().map(of).collect();
            let room = Room::of(&limits(window, max_patches), streams.iter(), 300);
            let is_waiting_for_room = streams.iter().any(|stream| room.is_due(stream) && !room.has_room(stream));
            let has_surplus = streams.iter().any(|stream| room.surplus(stream) > 0);
            prop_assert!(!is_waiting_for_room || has_surplus);
        }
    }
}

//! What an index stands for: pool, organ, case, size class and contrast bin, as a pure function of recipe and store.
//!
//! ```text
//! index --pools--> visit of the pool --organs--> visit of pool and organ --+--sizes--> visit of the size --contrasts-->
//!                                                                          +--round, position in it--> case
//! ```
//! A round visits every case of a pool and organ once, in a seeded order of its own, so visits differ by at most one; or as
//! often as the recipe's `patches_per_visit` says, one time after the other, for disks that are slow to find a volume.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use super::deal::{Host, Token, deal, largest_held};
use super::{Centre, Pool, Sequence, diameters_mm};
use crate::rng::{Purpose, Rng};
use crate::store::{CaseKind, CaseRecord};
use crate::volume::{ContrastBin, Organ, SizeClass};

/// Rounds kept at hand: streams walk through them in order, so the last few of each pool and organ suffice.
const CACHED_ROUNDS: usize = 64;
/// Visits in all rounds kept at hand (32 MiB), but for the last round.
const CACHED_VISITS: usize = 1 << 20;

/// What a recipe asks of the schedule.
#[derive(Clone, Debug)]
pub struct Mix {
    /// The seed of every order.
    pub seed: u64,
    /// Shares of the pools.
    pub pools: Vec<(Pool, f64)>,
    /// Shares of the organs.
    pub organs: Vec<(Organ, f64)>,
    /// Shares of the size classes.
    pub sizes: Vec<(SizeClass, f64)>,
    /// Shares of the contrast bins.
    pub contrasts: Vec<(ContrastBin, f64)>,
    /// Shares of what real patches show in their middle.
    pub centres: Vec<(Centre, f64)>,
    /// How many patches of an organ are taken from a volume before the next one's turn comes.
    pub patches_per_visit: usize,
    /// Voxel size (z, y, x) in mm, the larger of the store's and the models'.
    pub spacing_mm: [f64; 3],
    /// Side of the cube in which lesions of each size class are looked at, in mm, smallest class first.
    pub cube_mm: [f64; 4],
}

impl Mix {
    /// Returns the diameters in mm that an organ holding `holds_mm` can be asked for in a size class.
    pub fn diameters_mm(&self, size: SizeClass, holds_mm: f64) -> Option<[f64; 2]> {
        diameters_mm(size, holds_mm, self.spacing_mm, self.cube_mm[size as usize])
    }

    /// Lists the cases of `allowed` that serve an organ in a pool: for host pools, those that hold a requested size.
    fn hosts(&self, records: &[CaseRecord], allowed: &[bool], pool: Pool, organ: &Organ) -> Vec<Host> {
        let kind = match pool {
            Pool::UnlabelledHost => CaseKind::Unlabelled,
            Pool::LabelledReal | Pool::LabelledHost => CaseKind::Labelled,
        };
        let cases = records.iter().enumerate().filter(|(i, _)| allowed[*i]);
        cases
            .filter(|(_, record)| record.kind == kind)
            .filter_map(|(case, record)| {
                let held = record.organ(organ.id).filter(|held| held.voxels > 0)?;
                let fits = |size: SizeClass| self.diameters_mm(size, f64::from(held.holds_mm)).is_some();
                let asked = self.sizes.iter().filter(|(size, share)| *share > 0.0 && fits(*size));
                let sizes = asked.fold(0, |bits, (size, _)| bits | 1 << *size as u8);
                (pool == Pool::LabelledReal || sizes != 0).then_some(Host { case, sizes })
            })
            .collect()
    }
}

/// What an index stands for.
#[derive(Clone, Debug, PartialEq)]
pub struct Draw {
    /// The pool.
    pub pool: Pool,
    /// The organ.
    pub organ: Organ,
    /// The case's position in the store.
    pub case: usize,
    /// The size class; without meaning for real patches.
    pub size: SizeClass,
    /// The contrast bin; without meaning for real patches.
    pub contrast: ContrastBin,
    /// What a real patch shows in its middle; without meaning for hosts.
    pub centre: Centre,
    /// Whether the scheduled size had to give way to one that the case can hold.
    pub is_shortfall: bool,
}

/// The visits of one pool and organ.
struct Cell {
    pool: Pool,
    organ: Organ,
    hosts: Vec<Host>,
    /// How often each is visited in a round, one time after the other.
    times: usize,
    sizes: Sequence<SizeClass>,
    contrasts: [Sequence<ContrastBin>; 4],
    centres: Sequence<Centre>,
}

/// The visits of one pool.
struct PoolVisits {
    organs: Sequence<usize>,
    cells: Vec<Cell>,
}

/// Cases and sizes of one round.
type Round = Arc<Vec<(Host, Token)>>;
/// Pool, organ id and round.
type RoundKey = (Pool, u8, u64);

/// Turns indices into draws.
pub struct Schedule {
    seed: u64,
    pools: Sequence<usize>,
    of_pools: Vec<PoolVisits>,
    shortfall: Vec<String>,
    rounds: Mutex<VecDeque<(RoundKey, Round)>>,
}

impl Schedule {
    /// Makes the schedule over the cases of `allowed`; nothing where no pool with a share has a case.
    pub fn new(mix: &Mix, records: &[CaseRecord], allowed: &[bool]) -> Option<Self> {
        let mut shortfall = Vec::new();
        let (mut of_pools, mut pools) = (Vec::new(), Vec::new());
        for (pool, share) in mix.pools.iter().filter(|(_, share)| *share > 0.0) {
            let cells: Vec<Cell> = mix
                .organs
                .iter()
                .filter(|(_, share)| *share > 0.0)
                .filter_map(|(organ, _)| {
                    cell(
                        mix,
                        *pool,
                        organ,
                        mix.hosts(records, allowed, *pool, organ),
                        &mut shortfall,
                    )
                })
                .collect();
            let organ_share = |cell: &Cell| {
                let of_organ = mix.organs.iter().find(|(organ, _)| *organ == cell.organ);
                of_organ.map_or(0.0, |(_, share)| *share)
            };
            let shares: Vec<(usize, f64)> = cells.iter().map(organ_share).enumerate().collect();
            if let Some(organs) = Sequence::new(&shares, offset(mix.seed, 1 + *pool as u64)) {
                pools.push((of_pools.len(), *share));
                of_pools.push(PoolVisits { organs, cells });
            }
        }
        Some(Self {
            seed: mix.seed,
            pools: Sequence::new(&pools, offset(mix.seed, 0))?,
            of_pools,
            shortfall,
            rounds: Mutex::default(),
        })
    }

    /// Returns what an index stands for.
    pub fn draw(&self, index: u64) -> Draw {
        let (pool, visit) = self.pools.at(index);
        let visits = &self.of_pools[pool];
        let (cell, visit) = visits.organs.at(visit);
        let cell = &visits.cells[cell];
        let n = (cell.hosts.len() * cell.times) as u64;
        let (host, token) = self.round(cell, visit / n)[(visit % n) as usize];
        let size = match cell.pool {
            Pool::LabelledReal => token.size,
            _ => largest_held(host, token.size),
        };
        Draw {
            pool: cell.pool,
            organ: cell.organ.clone(),
            case: host.case,
            size,
            contrast: cell.contrasts[token.size as usize].at(token.visit).0,
            centre: cell.centres.at(visit).0,
            is_shortfall: size != token.size,
        }
    }

    /// Lists, per pool and organ, how many cases serve it.
    pub fn feasible(&self) -> impl Iterator<Item = (Pool, &str, u64)> {
        let cells = self.of_pools.iter().flat_map(|visits| &visits.cells);
        cells.map(|cell| (cell.pool, cell.organ.name.as_str(), cell.hosts.len() as u64))
    }

    /// Counts the distinct cases that host lesions, or those of the real pool where nothing hosts.
    pub fn pool_size(&self) -> u64 {
        let count = |hosting: bool| {
            let cells = self.of_pools.iter().flat_map(|visits| &visits.cells);
            let cells = cells.filter(|cell| (cell.pool != Pool::LabelledReal) == hosting);
            let cases: std::collections::BTreeSet<usize> =
                cells.flat_map(|cell| cell.hosts.iter().map(|host| host.case)).collect();
            cases.len() as u64
        };
        match count(true) {
            0 => count(false),
            hosts => hosts,
        }
    }

    /// Returns the most visits of a round.
    pub fn longest_round(&self) -> usize {
        let cells = self.of_pools.iter().flat_map(|visits| &visits.cells);
        cells.map(|cell| cell.hosts.len() * cell.times).max().unwrap_or(0)
    }

    /// Lists requested bins that no case of a pool can hold, as `pool/organ/size`, and with figures those that too few can.
    pub fn shortfall(&self) -> &[String] {
        &self.shortfall
    }

    fn round(&self, cell: &Cell, number: u64) -> Round {
        let key = (cell.pool, cell.organ.id, number);
        let cached = |rounds: &VecDeque<(RoundKey, Round)>| {
            rounds
                .iter()
                .find(|(known, _)| *known == key)
                .map(|(_, round)| round.clone())
        };
        if let Some(round) = cached(&self.rounds.lock().unwrap_or_else(PoisonError::into_inner)) {
            return round;
        }
        // Computed outside the lock: two threads may both do it, with the same result.
        let round = Arc::new(deal_round(self.seed, cell, number));
        let mut rounds = self.rounds.lock().unwrap_or_else(PoisonError::into_inner);
        if cached(&rounds).is_none() {
            rounds.push_back((key, round.clone()));
            let visits =
                |rounds: &VecDeque<(RoundKey, Round)>| rounds.iter().map(|(_, round)| round.len()).sum::<usize>();
            while rounds.len() > 1 && (rounds.len() > CACHED_ROUNDS || visits(&rounds) > CACHED_VISITS) {
                rounds.pop_front();
            }
        }
        round
    }
}

/// Returns where a sequence starts in its period.
fn offset(seed: u64, sequence: u64) -> u64 {
    Rng::keyed(seed, sequence, 0, Purpose::Pool).below(1000) as u64
}

fn cell(mix: &Mix, pool: Pool, organ: &Organ, hosts: Vec<Host>, shortfall: &mut Vec<String>) -> Option<Cell> {
    let mut sizes = mix.sizes.clone();
    if pool != Pool::LabelledReal {
        let total: f64 = sizes.iter().map(|(_, share)| share).sum();
        for (size, share) in sizes.iter_mut().filter(|(_, share)| *share > 0.0) {
            let holding = hosts.iter().filter(|host| host.holds(*size)).count();
            let bin = format!("{}/{}/{}", pool.name(), organ.name, size.name());
            let asked = *share / total;
            if holding == 0 {
                shortfall.push(bin);
                *share = 0.0;
            } else if (holding as f64) < asked * hosts.len() as f64 {
                let (asked, all) = ((100.0 * asked).round(), hosts.len());
                shortfall.push(format!("{bin}: {asked} % asked, {holding} of {all} cases hold it"));
            }
        }
    }
    if hosts.is_empty() {
        return None;
    }
    // Every sequence of a seed has a number of its own: pool, organ, and size for contrasts.
    let number = |of: u64| (pool as u64 + 1) << 32 | u64::from(organ.id) << 8 | of;
    let contrasts = |size: SizeClass| Sequence::new(&mix.contrasts, offset(mix.seed, number(1 + size as u64)));
    let [tiny, small, medium, large] = SizeClass::ALL.map(contrasts);
    Some(Cell {
        pool,
        organ: organ.clone(),
        sizes: Sequence::new(&sizes, offset(mix.seed, number(0)))?,
        contrasts: [tiny?, small?, medium?, large?],
        // From the start of its period: by default, tumour and organ take turns.
        centres: Sequence::new(&mix.centres, 0)?,
        hosts,
        times: mix.patches_per_visit,
    })
}

fn deal_round(seed: u64, cell: &Cell, number: u64) -> Vec<(Host, Token)> {
    let mut order = cell.hosts.clone();
    let lane = (cell.pool as u64 + 1) << 8 | u64::from(cell.organ.id);
    // The attempt is the pool and organ, shifted away from the offsets' attempt 0.
    Rng::keyed(seed, number, lane, Purpose::Pool).shuffle(&mut order);
    let hosts: Vec<Host> = (order.into_iter().flat_map(|host| std::iter::repeat_n(host, cell.times))).collect();
    let first = number * hosts.len() as u64;
    let mut tokens: Vec<Token> = (first..first + hosts.len() as u64)
        .map(|visit| {
            let (size, visit) = cell.sizes.at(visit);
            Token { size, visit }
        })
        .collect();
    if cell.pool != Pool::LabelledReal {
        deal(&hosts, &mut tokens);
    }
    hosts.into_iter().zip(tokens).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;
    use crate::store::{OrganRecord, SourceGeometry};
    use crate::volume::{Affine, Annotation, Fingerprint, Grid, LabelMap, Region};
    use std::collections::BTreeMap;

    /// Every fourth case is labelled; every tenth holds large lesions, the others medium ones at most.
    fn record(number: usize, organs: &[Organ]) -> CaseRecord {
        let holds_mm = if number.is_multiple_of(10) { 80.0 } else { 30.0 };
        let organ = |organ: &Organ| OrganRecord {
            id: organ.id,
            voxels: 1000,
            region: Region::whole([8; 3]),
            holds_mm,
        };
        let affine = Affine::axis_aligned([1.5; 3], [0.0; 3]);
        CaseRecord {
            id: format!("{number:05}"),
            kind: if number.is_multiple_of(4) {
                CaseKind::Labelled
            } else {
                CaseKind::Unlabelled
            },
            grid: Grid { shape: [8; 3], affine },
            annotation: Annotation {
                classes: Vec::new(),
                assumed_tumour_free: true,
            },
            patient: String::new(),
            labels_by: String::new(),
            source_hash: Digest::default(),
            fingerprint: Fingerprint::default(),
            content_hash: Digest::default(),
            source: SourceGeometry {
                shape_xyz: [8; 3],
                affine_xyz: affine.0,
                orientation: "RAS".into(),
            },
            organs: organs.iter().map(organ).collect(),
            tumours: Vec::new(),
        }
    }

    fn schedule(large: f64, patches_per_visit: usize) -> (Schedule, Vec<CaseRecord>) {
        let organs = LabelMap::default().organs();
        let records: Vec<_> = (0..203).map(|number| record(number, &organs)).collect();
        let mix = Mix {
            seed: 5,
            pools: vec![
                (Pool::LabelledReal, 1.0),
                (Pool::LabelledHost, 1.0),
                (Pool::UnlabelledHost, 2.0),
            ],
            organs: organs.into_iter().zip([2.0, 1.0, 1.0]).collect(),
            sizes: vec![(SizeClass::Small, 1.0 - large), (SizeClass::Large, large)],
            contrasts: vec![(ContrastBin::Dark, 0.75), (ContrastBin::Iso, 0.25)],
            centres: vec![(Centre::Tumour, 0.33), (Centre::Anywhere, 0.67)],
            patches_per_visit,
            spacing_mm: [1.5; 3],
            cube_mm: [48.0, 72.0, 96.0, 144.0],
        };
        let allowed = vec![true; records.len()];
        (Schedule::new(&mix, &records, &allowed).unwrap(), records)
    }

    #[test]
    fn shares_hold_in_every_stretch_and_visits_stay_even() {
        let (schedule, records) = schedule(0.05, 1);
        let mut visits: BTreeMap<(Pool, u8), BTreeMap<usize, u64>> = BTreeMap::new();
        let (mut hosts, mut large, mut dark, n) = (0u32, 0u32, 0u32, 8000u32);
        for index in 0..u64::from(n) {
            let draw = schedule.draw(index);
            *visits
                .entry((draw.pool, draw.organ.id))
                .or_default()
                .entry(draw.case)
                .or_default() += 1;
            if draw.pool != Pool::LabelledReal {
                hosts += 1;
                large += u32::from(draw.size == SizeClass::Large);
                dark += u32::from(draw.contrast == ContrastBin::Dark);
                assert!(draw.size != SizeClass::Large || draw.case.is_multiple_of(10));
                assert!(!draw.is_shortfall, "index {index}");
            }
            let kind = records[draw.case].kind;
            assert_eq!(kind == CaseKind::Unlabelled, draw.pool == Pool::UnlabelledHost);
        }
        assert_eq!(hosts, n / 4 * 3);
        // Six pairs of pool and organ, each within one round's sizes of its share.
        assert!(large.abs_diff(hosts / 20) <= 6 * 3, "{large}");
        assert!(dark.abs_diff(hosts / 4 * 3) <= 24, "{dark}");
        for ((pool, organ), cases) in &visits {
            let known = if *pool == Pool::UnlabelledHost { 152 } else { 51 };
            let total: u64 = cases.values().sum();
            let share = if *organ == 1 { 2 } else { 1 } * if known == 152 { 2 } else { 1 };
            assert_eq!(total, u64::from(n) / 16 * share);
            assert_eq!(cases.len(), known);
            assert!(cases.values().max().unwrap() - cases.values().min().unwrap() <= 1);
        }
    }

    #[test]
    fn a_volume_gives_its_patches_one_after_the_other() {
        let (schedule, _) = schedule(0.05, 5);
        let mut seen: BTreeMap<(Pool, u8), Vec<Draw>> = BTreeMap::new();
        for draw in (0..4000).map(|index| schedule.draw(index)) {
            seen.entry((draw.pool, draw.organ.id)).or_default().push(draw);
        }
        for ((pool, _), draws) in seen {
            let cases: Vec<usize> = draws.chunks_exact(5).map(|visit| visit[0].case).collect();
            assert!(
                draws
                    .chunks_exact(5)
                    .zip(&cases)
                    .all(|(visit, case)| visit.iter().all(|draw| draw.case == *case))
            );
            // No volume comes again before all had their turn.
            let known = if pool == Pool::UnlabelledHost { 152 } else { 51 };
            let round: std::collections::BTreeSet<_> = cases.iter().take(known).collect();
            assert_eq!(round.len(), known.min(cases.len()));
            let anywhere = draws.iter().filter(|draw| draw.centre == Centre::Anywhere).count();
            assert!(anywhere.abs_diff(draws.len() * 67 / 100) <= 1);
            let holds = |draw: &Draw| draw.size != SizeClass::Large || draw.case.is_multiple_of(10);
            assert!(pool == Pool::LabelledReal || draws.iter().all(holds));
        }
    }

    #[test]
    fn draws_do_not_depend_on_what_was_asked_before() {
        let (forward, _) = schedule(0.05, 1);
        let (backward, _) = schedule(0.05, 1);
        let ahead: Vec<_> = (0..3000).map(|index| forward.draw(index)).collect();
        for index in (0..3000).rev() {
            assert_eq!(backward.draw(index), ahead[index as usize]);
        }
    }

    #[test]
    fn what_cannot_be_dealt_is_counted_as_a_shortfall() {
        // Half large, but only 10 of the 152 cases can hold them.
        let (schedule, _) = schedule(0.5, 1);
        let expected = "unlabelled_host/liver/large: 50 % asked, 10 of 152 cases hold it";
        assert!(
            schedule.shortfall().iter().any(|line| line == expected),
            "{:?}",
            schedule.shortfall()
        );
        let draws: Vec<_> = (0..4000).map(|index| schedule.draw(index)).collect();
        let hosts: Vec<_> = draws.iter().filter(|draw| draw.pool == Pool::UnlabelledHost).collect();
        let large = hosts.iter().filter(|draw| draw.size == SizeClass::Large).count() as f64;
        let fallen = hosts.iter().filter(|draw| draw.is_shortfall).count() as f64;
        let n = hosts.len() as f64;
        assert!((large + fallen - n / 2.0).abs() <= 20.0, "{large} {fallen} {n}");
        assert!((large / n - 10.0 / 152.0).abs() < 0.01, "{large} of {n}");
    }
}

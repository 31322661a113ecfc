//! Deals the size classes of a round to the cases that can hold them.

use crate::volume::SizeClass;

/// A case of a pool, and which size classes its organ can hold.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Host {
    /// The case's position in the store.
    pub(super) case: usize,
    /// One bit per requested size class.
    pub(super) sizes: u8,
}

impl Host {
    pub(super) fn holds(self, size: SizeClass) -> bool {
        self.sizes >> size as u8 & 1 == 1
    }
}

/// The size that the sequence gave to a visit, and its place among the visits of that size.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Token {
    pub(super) size: SizeClass,
    pub(super) visit: u64,
}

/// Swaps tokens between the visits of one round until every case holds its size, largest first: sizes that few cases
/// can hold go to those cases. What cannot be dealt stays where it is; see [`largest_held`].
pub(super) fn deal(hosts: &[Host], tokens: &mut [Token]) {
    for size in SizeClass::ALL.into_iter().rev() {
        let misfits: Vec<usize> = (0..hosts.len())
            .filter(|visit| tokens[*visit].size == size && !hosts[*visit].holds(size))
            .collect();
        let takers: Vec<usize> = (0..hosts.len())
            .filter(|visit| tokens[*visit].size < size && hosts[*visit].holds(size))
            .collect();
        // A taker gives away a smaller size, which is looked at in a later turn of this loop.
        for (misfit, taker) in misfits.into_iter().zip(takers) {
            tokens.swap(misfit, taker);
        }
    }
}

/// Returns the size a case is asked for: the dealt one, or the nearest that it holds, smaller before larger.
pub(super) fn largest_held(host: Host, size: SizeClass) -> SizeClass {
    let smaller = SizeClass::ALL.into_iter().rev().filter(|other| *other <= size);
    let larger = SizeClass::ALL.into_iter().filter(|other| *other > size);
    smaller.chain(larger).find(|other| host.holds(*other)).unwrap_or(size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use SizeClass::{Large, Medium, Small, Tiny};

    fn host(case: usize, sizes: &[SizeClass]) -> Host {
        Host {
            case,
            sizes: sizes.iter().fold(0, |bits, size| bits | 1 << *size as u8),
        }
    }

    #[test]
    fn large_lesions_go_to_large_organs_and_the_mix_stays() {
        let hosts = [
            host(0, &[Tiny, Small]),
            host(1, &SizeClass::ALL),
            host(2, &[Tiny]),
            host(3, &[Tiny, Small, Medium]),
        ];
        let mut tokens = [Large, Small, Medium, Tiny].map(|size| Token { size, visit: 0 });
        deal(&hosts, &mut tokens);
        assert_eq!(tokens.map(|token| token.size), [Small, Large, Tiny, Medium]);
        // Two large ones cannot be dealt: the second falls back.
        let mut tokens = [Large, Small, Large, Tiny].map(|size| Token { size, visit: 0 });
        deal(&hosts, &mut tokens);
        let asked: Vec<_> = (0..4).map(|i| largest_held(hosts[i], tokens[i].size)).collect();
        assert_eq!(asked.iter().filter(|size| **size == Large).count(), 1);
        assert!((0..4).all(|i| hosts[i].holds(asked[i])));
    }
}

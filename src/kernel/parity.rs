//! Rows taken apart by the parity of their voxels' places, and put together again: vectors cannot load every other number.

use super::isa::Isa;
use super::norm::for_every_isa;

for_every_isa! {
    /// Separates a row's voxels by parity; without a place for the odd ones they are left out.
    pub(super) fn split_row(from: &[f32], even: &mut [f32], odd: &mut [f32]) {
        for (even, pair) in even.iter_mut().zip(from.chunks(2)) {
            *even = pair[0];
        }
        for (odd, pair) in odd.iter_mut().zip(from.chunks_exact(2)) {
            *odd = pair[1];
        }
    }
}

for_every_isa! {
    /// Puts a row together from the voxels of each parity.
    pub(super) fn interleave_row(even: &[f32], odd: &[f32], to: &mut [f32]) {
        if let (Some(last), true) = (to.last_mut(), even.len() > odd.len()) {
            *last = even[even.len() - 1];
        }
        for (pair, (&even, &odd)) in to.chunks_exact_mut(2).zip(even.iter().zip(odd)) {
            pair.copy_from_slice(&[even, odd]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::tests::sets;

    #[test]
    fn rows_come_together_again() {
        for (isa, length) in sets()
            .into_iter()
            .flat_map(|isa| (1..70).map(move |length| (isa, length)))
        {
            let row: Vec<f32> = (0..length).map(|v| v as f32).collect();
            let (mut even, mut odd) = (vec![-1.0; row.len().div_ceil(2)], vec![-1.0; row.len() / 2]);
            split_row(isa, &row, &mut even, &mut odd);
            assert!(even.iter().all(|v| v % 2.0 == 0.0) && odd.iter().all(|v| v % 2.0 == 1.0));
            let mut again = vec![-1.0; row.len()];
            interleave_row(isa, &even, &odd, &mut again);
            assert_eq!(again, row);
        }
    }
}

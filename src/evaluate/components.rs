//! Connected components of voxel masks.

use ndarray::Array3;

/// Marks the 26-connected component that holds `seed` (1 inside); nothing where the seed is outside the mask.
pub fn component_of(mask: &Array3<u8>, seed: [usize; 3]) -> Array3<u8> {
    let mut out = Array3::zeros(mask.dim());
    if mask[seed] == 0 {
        return out;
    }
    let mut stack = vec![seed];
    out[seed] = 1;
    while let Some(voxel) = stack.pop() {
        for next in neighbours(voxel, mask.dim()) {
            if mask[next] != 0 && out[next] == 0 {
                out[next] = 1;
                stack.push(next);
            }
        }
    }
    out
}

/// Numbers the 26-connected components from 1, in order of their first voxel; returns them with their count.
pub fn components(mask: &Array3<u8>) -> (Array3<u32>, u32) {
    let mut out: Array3<u32> = Array3::zeros(mask.dim());
    let mut count = 0;
    let mut stack = Vec::new();
    for ((z, y, x), value) in mask.indexed_iter() {
        if *value == 0 || out[[z, y, x]] != 0 {
            continue;
        }
        count += 1;
        out[[z, y, x]] = count;
        stack.push([z, y, x]);
        while let Some(voxel) = stack.pop() {
            for next in neighbours(voxel, mask.dim()) {
                if mask[next] != 0 && out[next] == 0 {
                    out[next] = count;
                    stack.push(next);
                }
            }
        }
    }
    (out, count)
}

fn neighbours(voxel: [usize; 3], shape: (usize, usize, usize)) -> impl Iterator<Item = [usize; 3]> {
    let span = |v: usize, n: usize| v.saturating_sub(1)..(v + 2).min(n);
    let [z, y, x] = voxel;
    let (d, h, w) = shape;
    span(z, d).flat_map(move |z| span(y, h).flat_map(move |y| span(x, w).map(move |x| [z, y, x])))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn corners_connect_and_gaps_divide() {
        let mut mask = Array3::zeros((5, 3, 3));
        for voxel in [[0, 0, 0], [1, 1, 1], [4, 2, 2]] {
            mask[voxel] = 1;
        }
        let (numbers, count) = components(&mask);
        assert_eq!(
            (count, numbers[[0, 0, 0]], numbers[[1, 1, 1]], numbers[[4, 2, 2]]),
            (2, 1, 1, 2)
        );
        assert_eq!(
            component_of(&mask, [1, 1, 1])
                .iter()
                .map(|v| u32::from(*v))
                .sum::<u32>(),
            2
        );
    }
}

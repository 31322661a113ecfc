//! Connected components of voxel masks.

use std::collections::VecDeque;

use ndarray::Array3;

use super::Shape;

/// Which voxels count as connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connectivity {
    /// Those that share a face: 6 neighbours.
    Faces,
    /// Those that share a face, an edge or a corner: 26 neighbours.
    Corners,
}

impl Connectivity {
    /// Lists the steps to a voxel's neighbours in scan order.
    fn steps(self) -> Vec<[isize; 3]> {
        let most = match self {
            Self::Faces => 1,
            Self::Corners => 3,
        };
        ndarray::indices([3; 3])
            .into_iter()
            .map(|(z, y, x)| [z, y, x].map(|at| at as isize - 1))
            .filter(|step| (1..=most).contains(&step.iter().map(|along| along.abs()).sum::<isize>()))
            .collect()
    }
}

/// Lists the voxels of every component of a mask, in scan order of their first voxels and outwards from them.
pub fn components(mut mask: Array3<bool>, connectivity: Connectivity) -> Vec<Vec<Shape>> {
    let shape: Shape = mask.dim().into();
    ndarray::indices(shape)
        .into_iter()
        .filter_map(|(z, y, x)| {
            let members = take_component(&mut mask, [z, y, x], connectivity);
            (!members.is_empty()).then_some(members)
        })
        .collect()
}

/// Takes the component that holds a voxel out of a mask and lists it; nothing where the voxel is outside the mask.
pub fn take_component(mask: &mut Array3<bool>, start: Shape, connectivity: Connectivity) -> Vec<Shape> {
    let mut members = Vec::new();
    if !std::mem::take(&mut mask[start]) {
        return members;
    }
    let steps = connectivity.steps();
    let mut queue = VecDeque::from([start]);
    while let Some(voxel) = queue.pop_front() {
        members.push(voxel);
        for step in &steps {
            // A step past the first voxel wraps round to one past the last.
            let next: Shape = std::array::from_fn(|axis| voxel[axis].wrapping_add_signed(step[axis]));
            if mask.get_mut(next).is_some_and(std::mem::take) {
                queue.push_back(next);
            }
        }
    }
    members
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn corners_connect_and_gaps_divide() {
        let mut mask = Array3::from_elem((5, 3, 3), false);
        for voxel in [[0, 0, 0], [1, 1, 1], [1, 1, 2], [4, 2, 2]] {
            mask[voxel] = true;
        }
        let listed = components(mask.clone(), Connectivity::Corners);
        assert_eq!(listed, [vec![[0, 0, 0], [1, 1, 1], [1, 1, 2]], vec![[4, 2, 2]]]);
        let listed = components(mask.clone(), Connectivity::Faces);
        assert_eq!(listed, [vec![[0, 0, 0]], vec![[1, 1, 1], [1, 1, 2]], vec![[4, 2, 2]]]);
        assert_eq!(take_component(&mut mask, [1, 1, 2], Connectivity::Faces).len(), 2);
        assert!(take_component(&mut mask, [1, 1, 2], Connectivity::Faces).is_empty());
    }
}

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
    let shape: Shape = mask.dim().into();
    let mut queue = VecDeque::from([start]);
    while let Some(voxel) = queue.pop_front() {
        members.push(voxel);
        let reach = |axis: usize| voxel[axis].saturating_sub(1)..(voxel[axis] + 2).min(shape[axis]);
        for z in reach(0) {
            for y in reach(1) {
                for x in reach(2) {
                    let next = [z, y, x];
                    let steps: usize = (0..3).map(|axis| next[axis].abs_diff(voxel[axis])).sum();
                    let connects = connectivity == Connectivity::Corners || steps <= 1;
                    if connects && std::mem::take(&mut mask[next]) {
                        queue.push_back(next);
                    }
                }
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

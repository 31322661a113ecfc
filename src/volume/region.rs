//! Boxes of voxels that may reach past a volume's border.

use serde::{Deserialize, Serialize};

use super::Shape;

/// A box in a volume's voxel indices, ordered (z, y, x); it may lie partly or wholly outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, bincode::Encode, bincode::Decode)]
pub struct Region {
    /// The first voxel.
    pub start: [i64; 3],
    /// How many voxels along each axis.
    pub size: Shape,
}

impl Region {
    /// Returns the box that covers a whole volume.
    pub fn whole(shape: Shape) -> Self {
        Self {
            start: [0; 3],
            size: shape,
        }
    }

    /// Returns the box of `size` whose voxel `size / 2` lies on `centre`.
    pub fn centred(centre: [i64; 3], size: Shape) -> Self {
        Self {
            start: std::array::from_fn(|axis| centre[axis] - (size[axis] / 2) as i64),
            size,
        }
    }

    /// Returns one past the last voxel.
    pub fn end(&self) -> [i64; 3] {
        std::array::from_fn(|axis| self.start[axis] + self.size[axis] as i64)
    }

    /// Returns the part that two boxes share; a size is 0 where they do not meet.
    pub fn intersect(&self, other: &Self) -> Self {
        let start: [i64; 3] = std::array::from_fn(|axis| self.start[axis].max(other.start[axis]));
        let (a, b) = (self.end(), other.end());
        let size = std::array::from_fn(|axis| (a[axis].min(b[axis]) - start[axis]).max(0) as usize);
        Self { start, size }
    }

    /// Tells whether the box holds no voxel.
    pub fn is_empty(&self) -> bool {
        self.size.contains(&0)
    }

    /// Returns the number of voxels.
    pub fn voxels(&self) -> usize {
        self.size.iter().product()
    }

    /// Returns the same box with indices counted from `origin`.
    pub fn relative_to(&self, origin: [i64; 3]) -> Self {
        Self {
            start: std::array::from_fn(|axis| self.start[axis] - origin[axis]),
            size: self.size,
        }
    }

    /// Returns the box grown by `margin` voxels on both sides of every axis.
    pub fn grown(&self, margin: Shape) -> Self {
        Self {
            start: std::array::from_fn(|axis| self.start[axis] - margin[axis] as i64),
            size: std::array::from_fn(|axis| self.size[axis] + 2 * margin[axis]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boxes_meet_where_both_have_voxels() {
        let a = Region {
            start: [-2, 0, 0],
            size: [4, 4, 4],
        };
        let b = Region::whole([10, 2, 10]);
        assert_eq!(
            a.intersect(&b),
            Region {
                start: [0, 0, 0],
                size: [2, 2, 4]
            }
        );
        assert!(
            a.intersect(&Region {
                start: [5, 0, 0],
                size: [1, 1, 1]
            })
            .is_empty()
        );
        assert_eq!(Region::centred([5, 5, 5], [4, 3, 1]).start, [3, 4, 5]);
    }
}

//! Volumes in memory behind the same trait as the store: for tests and for the phantom's own checks.

use ndarray::{Array3, s};

use super::duplicates::{Known, find_near};
use super::{Candidate, CaseRecord, Cases, Crop, NearDuplicate, StoreError, snapshot_of};
use crate::digest::Digest;
use crate::volume::{AIR_HU, Plan, Region};

/// Volumes in memory.
#[derive(Default)]
pub struct MemoryStore {
    plan: Plan,
    records: Vec<CaseRecord>,
    near_duplicates: Vec<NearDuplicate>,
    volumes: Vec<(Array3<i16>, Array3<u8>)>,
}

impl MemoryStore {
    /// Starts an empty store.
    pub fn new(plan: Plan) -> Self {
        Self {
            plan,
            ..Self::default()
        }
    }

    /// Adds a case; ids must be given in ascending order.
    pub fn push(&mut self, record: CaseRecord, image: Array3<i16>, labels: Array3<u8>) {
        self.records.push(record);
        self.volumes.push((image, labels));
        let known = Known {
            records: &self.records[..self.records.len() - 1],
            near: &self.near_duplicates,
        };
        self.near_duplicates = find_near(&self.records, &known);
    }
}

/// Cuts a box out of a volume, filling what lies outside.
pub fn cut<T: Copy>(volume: &Array3<T>, region: Region, outside: T) -> Array3<T> {
    let mut out = Array3::from_elem(region.size, outside);
    let shape = volume.dim();
    let part = region.intersect(&Region::whole([shape.0, shape.1, shape.2]));
    if !part.is_empty() {
        let from = part.start.map(|v| v as usize);
        let to = part.relative_to(region.start).start.map(|v| v as usize);
        let [d, h, w] = part.size;
        out.slice_mut(s![to[0]..to[0] + d, to[1]..to[1] + h, to[2]..to[2] + w])
            .assign(&volume.slice(s![from[0]..from[0] + d, from[1]..from[1] + h, from[2]..from[2] + w]));
    }
    out
}

impl Cases for MemoryStore {
    fn plan(&self) -> &Plan {
        &self.plan
    }

    fn snapshot(&self) -> Digest {
        snapshot_of(&self.records, &self.plan)
    }

    fn records(&self) -> &[CaseRecord] {
        &self.records
    }

    fn near_duplicates(&self) -> &[NearDuplicate] {
        &self.near_duplicates
    }

    fn read(&self, case: usize, region: Region) -> Result<Crop, StoreError> {
        let (image, labels) = self
            .volumes
            .get(case)
            .ok_or_else(|| StoreError::NoCase(case.to_string()))?;
        Ok(Crop {
            region,
            image: cut(image, region, AIR_HU),
            labels: cut(labels, region, 0),
        })
    }

    fn candidates(&self, case: usize, organ_id: u8) -> Result<Vec<Candidate>, StoreError> {
        // Every organ voxel, with the depth of the largest ball as a stand-in: good enough to place small lesions.
        let (_, labels) = self
            .volumes
            .get(case)
            .ok_or_else(|| StoreError::NoCase(case.to_string()))?;
        let depth_mm = self.records[case]
            .organ(organ_id)
            .map_or(0.0, |organ| organ.holds_mm / 2.0);
        let voxels = labels.indexed_iter().filter(|(_, label)| **label == organ_id);
        Ok(voxels
            .map(|((z, y, x), _)| Candidate {
                voxel: [z as u16, y as u16, x as u16],
                depth_mm,
            })
            .collect())
    }
}

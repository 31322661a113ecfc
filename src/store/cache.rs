//! Chunks that have been unpacked, kept in bounded memory: a store that is read again and again is unpacked once.
//!
//! What is kept was checked when it was unpacked and is memory of this process (promise P6). A chunk is kept from its second
//! read on: of a store much larger than the cache hardly any chunk is read twice while its file is open, and copying all of
//! them here would cost a third of a read for nothing.

use std::sync::Arc;

use quick_cache::Weighter;
use quick_cache::sync::Cache;

/// Bytes of a chunk as it is written: 16 x 16 x 32 voxels of 16-bit HU and 8-bit labels.
const USUAL_BYTES: u64 = 8192 * 3;

/// The voxels of a chunk, x fastest.
pub(super) struct Unpacked {
    /// HU.
    pub(super) hu: Box<[i16]>,
    /// Label ids; none where all are background.
    pub(super) labels: Option<Box<[u8]>>,
}

impl Unpacked {
    fn bytes(&self) -> u64 {
        let labels = self.labels.as_ref().map_or(0, |labels| labels.len());
        (2 * self.hu.len() + labels + size_of::<Self>()) as u64
    }
}

/// A case's position in the store and a chunk's number in the case.
type Key = (usize, usize);

#[derive(Clone)]
struct Bytes;

impl Weighter<Key, Arc<Unpacked>> for Bytes {
    fn weight(&self, _: &Key, chunk: &Arc<Unpacked>) -> u64 {
        chunk.bytes()
    }
}

/// The chunks that are kept, of all cases of a store.
pub(super) struct ChunkCache(Cache<Key, Arc<Unpacked>, Bytes>);

impl ChunkCache {
    /// Makes a cache of at most `bytes` bytes.
    pub(super) fn new(bytes: u64) -> Self {
        let chunks = (bytes / USUAL_BYTES).max(1);
        Self(Cache::with_weighter(chunks as usize, bytes, Bytes))
    }

    /// Returns a chunk that is kept.
    pub(super) fn get(&self, case: usize, chunk: usize) -> Option<Arc<Unpacked>> {
        self.0.get(&(case, chunk))
    }

    /// Keeps a chunk; others give way.
    pub(super) fn put(&self, case: usize, chunk: usize, unpacked: Unpacked) {
        self.0.insert((case, chunk), Arc::new(unpacked));
    }

    /// Returns the bytes of what is kept.
    #[cfg(test)]
    pub(super) fn bytes(&self) -> u64 {
        self.0.weight()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_stays_under_the_bound() {
        let cache = ChunkCache::new(10 * USUAL_BYTES);
        for chunk in 0..100 {
            let unpacked = Unpacked {
                hu: vec![chunk as i16; 8192].into(),
                labels: (chunk % 2 == 0).then(|| vec![1; 8192].into()),
            };
            cache.put(3, chunk, unpacked);
            assert!(cache.bytes() <= 10 * USUAL_BYTES);
            assert_eq!(cache.get(3, chunk).map(|kept| kept.hu[0]), Some(chunk as i16));
        }
        assert!(cache.bytes() > 5 * USUAL_BYTES && cache.get(4, 99).is_none());
    }
}

//! How the convolution kernels lay volumes and weights out in memory.
//!
//! Legend: `ci`, `co` channels in and out; `k` side of the cubic kernel; `(d, h, w)` voxels. Output channels are worked
//! on in blocks of [`BLOCK`]; voxels in vectors of the instruction set's lanes.

use std::borrow::Cow;
use std::cell::RefCell;
use std::mem::MaybeUninit;

use rayon::prelude::*;

use super::isa::MAX_LANES;

/// Output channels that one register tile holds.
pub const BLOCK: usize = 8;

/// The shape of a convolution of stride 1 whose output is as large as its input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Channels in.
    pub ci: usize,
    /// Channels out.
    pub co: usize,
    /// Side of the kernel, 1 or 3.
    pub k: usize,
    /// Voxels `[d, h, w]`.
    pub size: [usize; 3],
}

impl Geometry {
    /// Returns the voxels of one channel.
    pub fn voxels(&self) -> usize {
        self.size.iter().product()
    }

    /// Returns the taps of the kernel.
    pub fn taps(&self) -> usize {
        self.k * self.k * self.k
    }

    /// Returns the blocks of output channels.
    pub fn blocks(&self) -> usize {
        self.co.div_ceil(BLOCK)
    }

    /// Returns the geometry of the gradient with respect to the input, itself a convolution.
    pub fn transposed(&self) -> Self {
        Self {
            ci: self.co,
            co: self.ci,
            ..*self
        }
    }
}

/// The channels of a batch: those of one tensor `[n, c, voxels]`, or of two side by side, which need not be joined in memory.
#[derive(Clone, Copy)]
pub struct Channels<'a> {
    parts: [&'a [f32]; 2],
    counts: [usize; 2],
    voxels: usize,
}

impl<'a> Channels<'a> {
    /// Takes the channels of one tensor.
    pub fn one(x: &'a [f32], count: usize, voxels: usize) -> Self {
        Self::pair([x, &[]], [count, 0], voxels)
    }

    /// Takes the channels of two tensors of as many samples and voxels, the first one's first.
    pub fn pair(parts: [&'a [f32]; 2], counts: [usize; 2], voxels: usize) -> Self {
        Self { parts, counts, voxels }
    }

    /// Returns the samples.
    pub fn samples(&self) -> usize {
        self.parts[0].len() / (self.counts[0] * self.voxels)
    }

    /// Returns the voxels of every channel of a sample, in order.
    pub fn of_sample(&self, sample: usize) -> impl Iterator<Item = &'a [f32]> {
        let voxels = self.voxels;
        let [first, second] = [0, 1].map(|i| {
            let size = self.counts[i] * voxels;
            self.parts[i][sample * size..][..size].chunks_exact(voxels)
        });
        first.chain(second)
    }

    /// Returns all channels in one buffer.
    pub fn joined(&self) -> Cow<'a, [f32]> {
        match self.counts[1] {
            0 => Cow::Borrowed(self.parts[0]),
            _ => Cow::Owned(
                (0..self.samples())
                    .flat_map(|sample| self.of_sample(sample))
                    .flatten()
                    .copied()
                    .collect(),
            ),
        }
    }
}

/// Numbers that follow the last channel of [`Padded`], for vectors that run over its end.
pub const SLACK: usize = 2 * MAX_LANES;

/// One sample with zeros around it, so that every tap of a kernel is one shift of all voxels' places.
pub struct Padded<'a> {
    /// The numbers.
    pub values: Cow<'a, [f32]>,
    /// Numbers from the place of one row's voxels to the next row's.
    pub row: usize,
    /// Numbers from one plane to the next.
    pub plane: usize,
    /// Numbers from one channel to the next.
    pub channel: usize,
    /// The shift of every tap, in the order of the weights.
    pub taps: Vec<usize>,
}

impl<'a> Padded<'a> {
    /// Pads one sample `[c, d, h, w]` by p = k / 2 on all sides; without padding, and where planes are whole vectors, it is
    /// the sample itself.
    pub fn new(x: &'a [f32], g: &Geometry) -> Self {
        let (channels, [d, h, w]) = (g.ci, g.size);
        let p = g.k / 2;
        let row = w + 2 * p;
        let plane = (h + 2 * p) * row;
        let channel = (d + 2 * p) * plane;
        let taps = (0..g.taps())
            .map(|tap| tap / (g.k * g.k) * plane + tap / g.k % g.k * row + tap % g.k)
            .collect();
        if p == 0 && plane.is_multiple_of(MAX_LANES) {
            return Self {
                values: Cow::Borrowed(x),
                row,
                plane,
                channel,
                taps,
            };
        }
        let values = from_zeros(channels * channel + SLACK, channel, |at, to| {
            // The slack, which follows the last channel, has nothing to copy.
            let of_channel = x.chunks_exact(d * h * w).nth(at).unwrap_or_default();
            for (z, from) in of_channel.chunks_exact(h * w).enumerate() {
                let to = &mut to[(z + p) * plane + p * row..];
                for (y, from) in from.chunks_exact(w).enumerate() {
                    to[y * row + p..][..w].copy_from_slice(from);
                }
            }
        });
        Self {
            values: Cow::Owned(values),
            row,
            plane,
            channel,
            taps,
        }
    }
}

/// Where the vectors of one plane start.
///
/// Rows cut into vectors waste lanes where the width is not a multiple of the lanes (half of them for 8 voxels in 16
/// lanes); the padded plane read as one long row wastes only its padding. The shape alone decides which is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vectors {
    /// Rows that are cut into vectors: h, or 1 where the plane is one row.
    pub rows: usize,
    /// Vectors per such row.
    pub per_row: usize,
    /// Numbers from one row of voxels to the next on the side without padding.
    pub pitch: usize,
    /// Numbers of one plane on the side without padding, a multiple of the lanes.
    pub plane: usize,
}

impl Vectors {
    /// Chooses the cut of planes of h x w voxels whose padded rows are `padded_row` numbers long.
    pub fn new(h: usize, w: usize, padded_row: usize, lanes: usize) -> Self {
        let by_row = w.div_ceil(lanes);
        let whole = (h * padded_row).div_ceil(lanes);
        if h * by_row <= whole {
            return Self {
                rows: h,
                per_row: by_row,
                pitch: by_row * lanes,
                plane: h * by_row * lanes,
            };
        }
        Self {
            rows: 1,
            per_row: whole,
            pitch: padded_row,
            plane: whole * lanes,
        }
    }
}

/// Reorders weights `[co, ci, taps]` to `[block, ci, taps, BLOCK]`, zero where the last block has no channel.
pub fn pack(weight: &[f32], [co, ci, taps]: [usize; 3]) -> Vec<f32> {
    let per_block = ci * taps * BLOCK;
    from_zeros(co.div_ceil(BLOCK) * per_block, per_block, |block, to| {
        for (lane, of_channel) in weight
            .chunks_exact(ci * taps)
            .skip(block * BLOCK)
            .take(BLOCK)
            .enumerate()
        {
            for (to, &value) in to.chunks_exact_mut(BLOCK).zip(of_channel) {
                to[lane] = value;
            }
        }
    })
}

/// Returns the weights `[ci, co, taps]` of the gradient with respect to the input: channels swapped, taps reversed.
pub fn transpose(weight: &[f32], g: &Geometry) -> Vec<f32> {
    let taps = g.taps();
    let mut out = vec![0.0; weight.len()];
    for c in 0..g.co {
        for i in 0..g.ci {
            for tap in 0..taps {
                out[(i * g.co + c) * taps + taps - 1 - tap] = weight[(c * g.ci + i) * taps + tap];
            }
        }
    }
    out
}

/// Makes a buffer of `length` numbers in parts of `part`, the last one possibly shorter: each is set to 0 and handed to
/// `fill` with its position, on whatever thread comes first.
///
/// What `vec![0.0; length]` does on one thread (and the page faults of a large buffer with it) is shared this way, and a
/// part is still in the cache when it is filled.
pub fn from_zeros(length: usize, part: usize, fill: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f32> {
    let mut out: Vec<f32> = Vec::with_capacity(length);
    out.spare_capacity_mut()[..length]
        .par_chunks_mut(part)
        .enumerate()
        .for_each(|(at, part): (usize, &mut [MaybeUninit<f32>])| {
            part.fill(MaybeUninit::new(0.0));
            // SAFETY: every number was just written.
            fill(at, unsafe { part.assume_init_mut() });
        });
    // SAFETY: the parts cover the first `length` numbers, and every one was written.
    unsafe { out.set_len(length) };
    out
}

thread_local! {
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Lends `f` a buffer of the thread, at least as long as asked for, which holds whatever was left in it.
///
/// A kernel's tasks would otherwise each take a new one from the operating system, page by page.
///
/// # Panics
/// Where `f` asks for another one.
pub fn with_scratch<R>(length: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    SCRATCH.with_borrow_mut(|buffer| {
        if buffer.len() < length {
            buffer.resize(length, 0.0);
        }
        f(&mut buffer[..length])
    })
}

/// A buffer that tasks write disjoint parts of.
#[derive(Clone, Copy)]
pub struct Shared(*mut f32);

// SAFETY: the pointer is only used through `slice`, whose caller promises that parts do not overlap.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// Shares a buffer.
    pub fn new(buffer: &mut [f32]) -> Self {
        Self(buffer.as_mut_ptr())
    }

    /// Returns one part.
    ///
    /// # Safety
    /// The part lies within the buffer, the buffer is still borrowed, and no other part in use overlaps it.
    #[expect(clippy::mut_from_ref, reason = "the point of the type; the contract is above")]
    pub unsafe fn slice(&self, start: usize, length: usize) -> &mut [f32] {
        // SAFETY: the caller promises bounds, life and exclusiveness.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), length) }
    }
}

//! 3D convolution with stride 2 on the CPU, for kernels of side 1 and 3 with zero padding of half the side.
//!
//! Voxels that are read together lie two apart, which vectors cannot load. So the input is split by the parity of z, y
//! and x into eight *phases*, whose rows are contiguous; a tap then reads one phase at one shift, and the direct kernels
//! of stride 1 do the rest with other shifts. The gradient with respect to the input has phases, too: each is a
//! convolution of the output's gradient with those taps that reach its parity, and their rows interleave.
//!
//! Legend: p = k / 2; an axis of n voxels has ceil(n / 2) outputs, and output o reads voxels 2o + tap - p. An odd phase
//! holds voxel 2j - 1 at j, so that it starts with the padding; an even one holds voxel 2j at j.

use std::borrow::Cow;

use rayon::prelude::*;

use super::convolution::{self, Direct, Taps};
use super::isa::Isa;
use super::layout::{BLOCK, Geometry, Padded, SLACK, Shared, from_zeros};
use super::parity::{interleave_row, split_row};
use super::weight_gradient;

/// Phases of a volume, z's parity times 4 + y's times 2 + x's.
const PHASES: usize = 8;

/// Returns the voxels of the output.
pub fn halved(size: [usize; 3]) -> [usize; 3] {
    size.map(|n| n.div_ceil(2))
}

/// A convolution of stride 2, by the channels and kernel of `of` and the voxels of its input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strided {
    /// Channels, side of the kernel, and voxels of the input.
    of: Geometry,
    /// The same with the voxels of the output.
    output: Geometry,
}

impl Strided {
    /// Describes the convolution of inputs of that geometry.
    pub fn new(of: Geometry) -> Self {
        let output = Geometry {
            size: halved(of.size),
            ..of
        };
        Self { of, output }
    }

    /// Convolves a batch.
    ///
    /// # Shape
    /// x `[n, ci, d, h, w]`, weight `[co, ci, k, k, k]`, bias `[co]` -> `[n, co, ceil(d/2), ceil(h/2), ceil(w/2)]`.
    pub fn forward(&self, isa: Isa, x: &[f32], weight: &[f32], bias: &[f32]) -> Vec<f32> {
        convolution::of_padded(isa, &self.output, self.samples(isa, x), weight, bias)
    }

    /// Computes the gradient of the weights.
    ///
    /// # Shape
    /// x `[n, ci, d, h, w]`, gradient shaped like the output -> `[co, ci, k, k, k]`.
    pub fn weight_gradient(&self, isa: Isa, x: &[f32], gradient: &[f32]) -> Vec<f32> {
        weight_gradient::of_padded(isa, &self.output, self.samples(isa, x), gradient)
    }

    /// Computes the gradient with respect to the input from that of the output.
    ///
    /// # Shape
    /// gradient shaped like the output, weight `[co, ci, k, k, k]` -> `[n, ci, d, h, w]`.
    pub fn input_gradient(&self, isa: Isa, gradient: &[f32], weight: &[f32]) -> Vec<f32> {
        let (size_in, size_out) = (self.of.ci * self.of.voxels(), self.of.co * self.output.voxels());
        let mut dx = from_zeros(gradient.len() / size_out * size_in, self.of.voxels(), |_, _| ());
        for (gradient, dx) in gradient.chunks_exact(size_out).zip(dx.chunks_exact_mut(size_in)) {
            let input = self.behind(gradient);
            let phases: [Phase; PHASES] = std::array::from_fn(|phase| self.phase(phase, weight, &input));
            self.interleave(isa, &input, &phases, dx);
        }
        dx
    }

    /// Splits every sample into its phases.
    fn samples<'a>(&'a self, isa: Isa, x: &'a [f32]) -> impl ExactSizeIterator<Item = Padded<'a>> {
        x.chunks_exact(self.of.ci * self.of.voxels())
            .map(move |x| self.split(isa, x))
    }

    /// Splits one sample into phases, `[ci, phases, D, H, W]` with room for p voxels more than the output along each axis.
    ///
    /// A kernel of side 1 reads the first phase alone.
    fn split(&self, isa: Isa, x: &[f32]) -> Padded<'static> {
        let (p, [d, h, w]) = (self.of.k / 2, self.of.size);
        let [deep, high, row] = self.output.size.map(|n| n + p);
        let (plane, phase) = (high * row, deep * high * row);
        let channel = phase * if p == 0 { 1 } else { PHASES };
        let values = from_zeros(self.of.ci * channel + SLACK, channel, |at, to| {
            // The slack, which follows the last channel, has no voxels.
            let of_channel = x.chunks_exact(d * h * w).nth(at).unwrap_or_default();
            for (at, from) in of_channel.chunks_exact(w).enumerate() {
                let (z, y) = (at / h, at % h);
                if p == 0 && (z % 2 == 1 || y % 2 == 1) {
                    continue;
                }
                let pair = (z % 2 * 4 + y % 2 * 2) * phase;
                let start = pair + z.div_ceil(2) * plane + y.div_ceil(2) * row;
                if p == 0 {
                    split_row(isa, from, &mut to[start..][..row], &mut []);
                } else {
                    let (even, odd) = to[start..].split_at_mut(phase);
                    split_row(isa, from, &mut even[..w.div_ceil(2)], &mut odd[1..][..w / 2]);
                }
            }
        });
        Padded {
            values: Cow::Owned(values),
            row,
            plane,
            channel,
            taps: self.shifts(phase, plane, row),
        }
    }

    /// Returns where every tap reads, in phases of so many numbers.
    fn shifts(&self, phase: usize, plane: usize, row: usize) -> Vec<usize> {
        let (k, p) = (self.of.k, self.of.k / 2);
        let of_tap = |tap: usize| {
            let [z, y, x] = [tap / (k * k), tap / k % k, tap % k];
            let [odd_z, odd_y, odd_x] = [z, y, x].map(|t| (t + p) % 2);
            (4 * odd_z + 2 * odd_y + odd_x) * phase + z / 2 * plane + y / 2 * row + x / 2
        };
        (0..k * k * k).map(of_tap).collect()
    }

    /// Copies a gradient to `[co, D + 1, H + 1, W + 1]`, zeros behind the last voxel of each axis.
    fn behind(&self, gradient: &[f32]) -> Padded<'static> {
        let [d, h, w] = self.output.size;
        let (row, plane, channel) = (w + 1, (h + 1) * (w + 1), (d + 1) * (h + 1) * (w + 1));
        let values = from_zeros(self.of.co * channel + SLACK, channel, |at, to| {
            let of_channel = gradient.chunks_exact(d * h * w).nth(at).unwrap_or_default();
            for (to, from) in to.chunks_exact_mut(plane).zip(of_channel.chunks_exact(h * w)) {
                for (to, from) in to.chunks_exact_mut(row).zip(from.chunks_exact(w)) {
                    to[..w].copy_from_slice(from);
                }
            }
        });
        Padded {
            values: Cow::Owned(values),
            row,
            plane,
            channel,
            taps: Vec::new(),
        }
    }

    /// Returns the convolution of the output's gradient that makes one phase of the input's.
    ///
    /// Voxel 2j + e is read by output o at the tap where 2o + tap - p = 2j + e, so o = j + (e + p - tap) / 2.
    fn phase(&self, phase: usize, weight: &[f32], input: &Padded) -> Phase {
        let (ci, co, k, p) = (self.of.ci, self.of.co, self.of.k, self.of.k / 2);
        let parity = [phase >> 2 & 1, phase >> 1 & 1, phase & 1];
        let reached: Vec<(usize, usize)> = (0..k * k * k)
            .filter_map(|tap| {
                let at = [tap / (k * k), tap / k % k, tap % k];
                let twice: [Option<usize>; 3] =
                    std::array::from_fn(|axis| (parity[axis] + p).checked_sub(at[axis]).filter(|twice| twice % 2 == 0));
                let [z, y, x] = twice;
                Some((tap, z? / 2 * input.plane + y? / 2 * input.row + x? / 2))
            })
            .collect();
        let per_block = co * reached.len() * BLOCK;
        // A kernel of side 1 reaches one phase only; the others have no weights.
        let packed = from_zeros(ci.div_ceil(BLOCK) * per_block, per_block.max(1), |block, to| {
            for (at, to) in to.chunks_exact_mut(BLOCK).enumerate() {
                let (co, (tap, _)) = (at / reached.len(), reached[at % reached.len()]);
                for (lane, to) in to.iter_mut().take(ci - block * BLOCK).enumerate() {
                    *to = weight[(co * ci + block * BLOCK + lane) * k * k * k + tap];
                }
            }
        });
        Phase {
            packed,
            shifts: reached.into_iter().map(|(_, shift)| shift).collect(),
        }
    }

    /// Writes the gradient with respect to one sample of input.
    fn interleave(&self, isa: Isa, input: &Padded, phases: &[Phase; PHASES], dx: &mut [f32]) {
        let (ci, [d, h, w]) = (self.of.ci, self.of.size);
        let back = self.output.transposed();
        let (direct, blocks) = (Direct::new(isa, &back, input), back.blocks());
        let dx = Shared::new(dx);
        (0..blocks * back.size[0]).into_par_iter().for_each_init(
            || vec![0.0; PHASES * direct.numbers()],
            |sums, task| {
                let (z, block) = (task / blocks, task % blocks);
                let live = BLOCK.min(ci - block * BLOCK);
                for (sums, phase) in sums.chunks_exact_mut(direct.numbers()).zip(phases) {
                    direct.start(sums, &[0.0; BLOCK][..live]);
                    direct.add(z, phase.taps(block, back.ci), live, sums);
                }
                for (lane, at) in (0..live).flat_map(|lane| (2 * z..d.min(2 * z + 2)).map(move |at| (lane, at))) {
                    // SAFETY: lane and block name a channel, `at` one of two planes that no other task has.
                    let plane = unsafe { dx.slice(((block * BLOCK + lane) * d + at) * h * w, h * w) };
                    for (y, to) in plane.chunks_exact_mut(w).enumerate() {
                        let pair = at % 2 * 4 + y % 2 * 2;
                        let of_phase = |phase: usize, w| {
                            let sums = &sums[phase * direct.numbers()..][..direct.numbers()];
                            direct.sums(sums).row(lane, y / 2, w)
                        };
                        interleave_row(isa, of_phase(pair, w.div_ceil(2)), of_phase(pair + 1, w / 2), to);
                    }
                }
            },
        );
    }
}

/// The convolution that makes one phase of an input's gradient.
struct Phase {
    /// Of the taps that reach the phase, in the output's gradient.
    shifts: Vec<usize>,
    /// `[block of ci, co, taps, BLOCK]`.
    packed: Vec<f32>,
}

impl Phase {
    /// Returns the taps of one block; the sum goes over `co` channels.
    fn taps(&self, block: usize, co: usize) -> Taps<'_> {
        Taps {
            shifts: &self.shifts,
            weights: &self.packed[block * co * self.shifts.len() * BLOCK..],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::tests::{assert_close, normals, same_as_burn, same_for_threads, sets};
    use crate::kernel::{composed, conv3d};
    use burn::tensor::Tensor;

    fn strided(ci: usize, co: usize, k: usize, size: [usize; 3]) -> Strided {
        Strided::new(Geometry { ci, co, k, size })
    }

    /// Odd and even sizes, channels off the block, rows off the lanes, planes under a vector, single voxels.
    fn shapes() -> Vec<Strided> {
        vec![
            strided(1, 1, 3, [1, 1, 1]),
            strided(1, 16, 3, [4, 5, 6]),
            strided(3, 5, 3, [3, 7, 34]),
            strided(17, 9, 3, [2, 6, 33]),
            strided(9, 8, 3, [5, 8, 32]),
            strided(4, 11, 3, [8, 16, 16]),
            strided(40, 4, 3, [9, 1, 70]),
            strided(7, 3, 1, [3, 5, 7]),
            strided(9, 17, 1, [4, 6, 32]),
        ]
    }

    /// Calls `visit(output, weight, input)` with the flat indices of every product of one sample.
    fn products(s: &Strided, mut visit: impl FnMut(usize, usize, usize)) {
        let (Geometry { ci, co, k, size }, [od, oh, ow]) = (s.of, s.output.size);
        let input = |o: usize, tap: usize, n: usize| (2 * o + tap).checked_sub(k / 2).filter(|&i| i < n);
        for (co, ci, at, tap) in (0..co).flat_map(|co| {
            (0..ci).flat_map(move |i| (0..od * oh * ow).flat_map(move |at| (0..k * k * k).map(move |t| (co, i, at, t))))
        }) {
            let (o, t) = (
                [at / (oh * ow), at / ow % oh, at % ow],
                [tap / (k * k), tap / k % k, tap % k],
            );
            let read: [Option<usize>; 3] = std::array::from_fn(|axis| input(o[axis], t[axis], size[axis]));
            if let [Some(z), Some(y), Some(x)] = read {
                let weight = (co * s.of.ci + ci) * k * k * k + tap;
                visit(
                    co * od * oh * ow + at,
                    weight,
                    ((ci * size[0] + z) * size[1] + y) * size[2] + x,
                );
            }
        }
    }

    /// Draws a batch of two: x, the output's gradient, weight and bias.
    fn draw(s: &Strided) -> [Vec<f32>; 4] {
        let (g, out) = (s.of, s.output);
        let counts = [
            2 * g.ci * g.voxels(),
            2 * g.co * out.voxels(),
            g.co * g.ci * g.taps(),
            g.co,
        ];
        std::array::from_fn(|i| normals(counts[i], i as u64))
    }

    #[test]
    fn equals_the_loop() {
        for s in shapes() {
            let [x, gradient, weight, bias] = draw(&s);
            let voxels = s.output.voxels();
            let mut out: Vec<f64> = (0..gradient.len())
                .map(|i| f64::from(bias[i / voxels % s.of.co]))
                .collect();
            let (mut dx, mut dw) = (vec![0.0; x.len()], vec![0.0; weight.len()]);
            for n in 0..2 {
                let [in_base, out_base] = [n * x.len() / 2, n * gradient.len() / 2];
                products(&s, |o, w, i| {
                    let [xv, wv, gv] = [x[in_base + i], weight[w], gradient[out_base + o]].map(f64::from);
                    out[out_base + o] += xv * wv;
                    dx[in_base + i] += gv * wv;
                    dw[w] += gv * xv;
                });
            }
            for isa in sets() {
                // f32 rounding of at most 27 x 40 products of order 1.
                assert_close(&s.forward(isa, &x, &weight, &bias), &out, 2e-6);
                assert_close(&s.input_gradient(isa, &gradient, &weight), &dx, 2e-6);
                assert_close(&s.weight_gradient(isa, &x, &gradient), &dw, 2e-6);
            }
        }
    }

    #[test]
    fn equals_burns() {
        for (k, [d, h, w]) in [(3, [6, 4, 10]), (3, [5, 7, 3]), (1, [6, 5, 4])] {
            let bias = |t: &Tensor<5>| t.clone().reshape([6]);
            same_as_burn(
                [&[2, 3, d, h, w], &[6, 3, k, k, k], &[6]],
                |[x, w, b]| conv3d(x.clone(), w.clone(), bias(b), 2),
                |[x, w, b]| composed::conv3d(x.clone(), w.clone(), bias(b), 2),
            );
        }
    }

    #[test]
    fn ignores_threads_and_batch_mates() {
        let s = strided(5, 12, 3, [24, 19, 24]);
        let [x, gradient, weight, bias] = draw(&s);
        for isa in sets() {
            same_for_threads(|| s.forward(isa, &x, &weight, &bias));
            same_for_threads(|| s.input_gradient(isa, &gradient, &weight));
            same_for_threads(|| s.weight_gradient(isa, &x, &gradient));
            let (out, dx) = (
                s.forward(isa, &x, &weight, &bias),
                s.input_gradient(isa, &gradient, &weight),
            );
            let second = s.forward(isa, &x[x.len() / 2..], &weight, &bias);
            assert_eq!(out[out.len() / 2..], second);
            let second = s.input_gradient(isa, &gradient[gradient.len() / 2..], &weight);
            assert_eq!(dx[dx.len() / 2..], second);
        }
    }

    #[test]
    fn fused_instruction_sets_give_the_same_bits() {
        if !(Isa::Avx512.is_available() && Isa::Avx2.is_available()) {
            return;
        }
        for s in shapes() {
            let [x, gradient, weight, bias] = draw(&s);
            let run = |isa| {
                (
                    s.forward(isa, &x, &weight, &bias),
                    s.input_gradient(isa, &gradient, &weight),
                )
            };
            assert_eq!(run(Isa::Avx512), run(Isa::Avx2));
        }
    }

    #[test]
    fn gradients_are_slopes() {
        // The operator is linear in x and in the weight, so a difference quotient has rounding as its only error: sums of
        // some thousand products in f32.
        let s = strided(3, 4, 3, [5, 6, 7]);
        let [x, gradient, weight, bias] = draw(&s);
        let isa = Isa::best();
        let loss = |x: &[f32], weight: &[f32]| -> f64 {
            let out = s.forward(isa, x, weight, &bias);
            out.iter()
                .zip(&gradient)
                .map(|(o, g)| f64::from(*o) * f64::from(*g))
                .sum()
        };
        let moved =
            |v: &[f32], by: &[f32], step: f32| -> Vec<f32> { v.iter().zip(by).map(|(v, b)| v + step * b).collect() };
        let dx = s.input_gradient(isa, &gradient, &weight);
        let dw = s.weight_gradient(isa, &x, &gradient);
        let square = |v: &[f32]| v.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
        let along_x = (loss(&moved(&x, &dx, 0.5), &weight) - loss(&moved(&x, &dx, -0.5), &weight)) / square(&dx);
        let along_w = (loss(&x, &moved(&weight, &dw, 0.5)) - loss(&x, &moved(&weight, &dw, -0.5))) / square(&dw);
        assert!(
            (along_x - 1.0).abs() < 1e-5 && (along_w - 1.0).abs() < 1e-5,
            "{along_x} {along_w}"
        );
    }
}

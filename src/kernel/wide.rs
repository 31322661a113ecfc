//! Registers that read and write single precision and sum in double.
//!
//! The product of two `f32` is exact in `f64`, and up to 81 of them are summed with an error far below the rounding of the
//! result: every instruction set gives the same.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m256d, __m512d, _mm_loadu_ps, _mm_storeu_ps, _mm256_cvtpd_ps, _mm256_cvtps_pd, _mm256_fmadd_pd, _mm256_loadu_ps,
    _mm256_set1_pd, _mm256_storeu_ps, _mm512_cvtpd_ps, _mm512_cvtps_pd, _mm512_fmadd_pd, _mm512_set1_pd,
};

use super::isa::Accumulator;

/// The register of a processor of which nothing is known.
impl Accumulator for [f64; 4] {
    const COUNT: usize = 4;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        [f64::from(value); 4]
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller promises four readable numbers; an array of f32 is aligned like f32.
        unsafe { from.cast::<[f32; 4]>().read_unaligned() }.map(f64::from)
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller promises four writable numbers.
        unsafe { to.cast::<[f32; 4]>().write_unaligned(self.map(|v| v as f32)) }
    }

    #[inline(always)]
    unsafe fn add_product(self, a: Self, b: Self) -> Self {
        std::array::from_fn(|lane| self[lane] + a[lane] * b[lane])
    }
}

/// The numbers of one register of `f32`, in two.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub struct Wide<R>([R; 2]);

#[cfg(target_arch = "x86_64")]
macro_rules! intel_wide {
    ($half:ty, $count:literal, $splat:ident, $load:ident, $store:ident, $widen:ident, $narrow:ident, $fma:ident) => {
        impl Accumulator for Wide<$half> {
            const COUNT: usize = $count;

            #[inline(always)]
            unsafe fn splat(value: f32) -> Self {
                // SAFETY: the caller promises the instruction set.
                unsafe { Self([$splat(f64::from(value)); 2]) }
            }

            #[inline(always)]
            unsafe fn load(from: *const f32) -> Self {
                // SAFETY: the caller promises the instruction set and readable memory.
                unsafe { Self([$widen($load(from)), $widen($load(from.add($count / 2)))]) }
            }

            #[inline(always)]
            unsafe fn store(self, to: *mut f32) {
                // SAFETY: the caller promises the instruction set and writable memory.
                unsafe {
                    $store(to, $narrow(self.0[0]));
                    $store(to.add($count / 2), $narrow(self.0[1]));
                }
            }

            #[inline(always)]
            unsafe fn add_product(self, a: Self, b: Self) -> Self {
                // SAFETY: the caller promises the instruction set.
                unsafe { Self([$fma(a.0[0], b.0[0], self.0[0]), $fma(a.0[1], b.0[1], self.0[1])]) }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
intel_wide!(
    __m512d,
    16,
    _mm512_set1_pd,
    _mm256_loadu_ps,
    _mm256_storeu_ps,
    _mm512_cvtps_pd,
    _mm512_cvtpd_ps,
    _mm512_fmadd_pd
);
#[cfg(target_arch = "x86_64")]
intel_wide!(
    __m256d,
    8,
    _mm256_set1_pd,
    _mm_loadu_ps,
    _mm_storeu_ps,
    _mm256_cvtps_pd,
    _mm256_cvtpd_ps,
    _mm256_fmadd_pd
);

//! The processor's vector instructions: which set is used, and one register of it as a type.

use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m256, __m512, _mm256_add_ps, _mm256_fmadd_ps, _mm256_hadd_ps, _mm256_loadu_ps, _mm256_permute2f128_ps,
    _mm256_set1_ps, _mm256_storeu_ps, _mm256_sub_ps, _mm512_add_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_set1_ps,
    _mm512_storeu_ps, _mm512_sub_ps,
};

/// Names the variable that holds the kernels back to an older instruction set.
pub const OVERRIDE: &str = "FREETUMOR_KERNEL";

/// Most numbers of any [`Accumulator`].
pub const MAX_LANES: usize = 16;

/// An instruction set that the kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// 16 lanes, fused multiply-add.
    Avx512,
    /// 8 lanes, fused multiply-add.
    Avx2,
    /// 4 lanes, multiplication and addition rounded one after the other.
    Portable,
}

impl Isa {
    /// Returns the set that every kernel of this process uses.
    pub fn chosen() -> Self {
        static CHOSEN: OnceLock<Isa> = OnceLock::new();
        *CHOSEN.get_or_init(|| match std::env::var(OVERRIDE).as_deref() {
            Ok("portable") => Self::Portable,
            Ok("avx2") if Self::Avx2.is_available() => Self::Avx2,
            _ => Self::best(),
        })
    }

    /// Returns the widest set of this processor.
    pub fn best() -> Self {
        [Self::Avx512, Self::Avx2]
            .into_iter()
            .find(|isa| isa.is_available())
            .unwrap_or(Self::Portable)
    }

    /// Returns whether this processor has the set.
    pub fn is_available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => is_x86_feature_detected!("avx512f"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            Self::Portable => true,
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// Returns how many numbers one register holds.
    pub fn lanes(self) -> usize {
        match self {
            Self::Avx512 => 16,
            Self::Avx2 => 8,
            Self::Portable => 4,
        }
    }

    /// Returns the numerics class that results of this set belong to.
    pub fn numerics(self) -> &'static str {
        match self {
            Self::Avx512 => "cpu-avx512",
            Self::Avx2 => "cpu-avx2",
            Self::Portable => "cpu-portable",
        }
    }
}

/// A register in which products of numbers of single precision are summed.
pub trait Accumulator: Copy {
    /// How many numbers it holds, at most [`MAX_LANES`].
    const COUNT: usize;

    /// Fills the register with one number.
    ///
    /// # Safety
    /// The processor has the instruction set; so for every function of this trait.
    unsafe fn splat(value: f32) -> Self;

    /// Reads [`Self::COUNT`] numbers from `from`.
    ///
    /// # Safety
    /// They are readable; alignment does not matter.
    unsafe fn load(from: *const f32) -> Self;

    /// Writes [`Self::COUNT`] numbers to `to`.
    ///
    /// # Safety
    /// They are writable; alignment does not matter.
    unsafe fn store(self, to: *mut f32);

    /// Returns `self + a * b`.
    ///
    /// # Safety
    /// The processor has the instruction set.
    unsafe fn add_product(self, a: Self, b: Self) -> Self;
}

/// One vector register of `f32`.
pub trait Lanes: Accumulator {
    /// Returns `self + other`.
    ///
    /// # Safety
    /// The processor has the instruction set.
    unsafe fn plus(self, other: Self) -> Self;

    /// Returns `self - other`.
    ///
    /// # Safety
    /// The processor has the instruction set.
    unsafe fn minus(self, other: Self) -> Self;

    /// Adds the lanes of each of eight registers that lie one after the other, as a tree.
    ///
    /// # Safety
    /// They are readable; alignment does not matter.
    unsafe fn sum_lanes(registers: *const f32) -> [f32; 8];

    /// Writes the first `count` numbers to `to`, all of them where there are fewer.
    ///
    /// # Safety
    /// They are writable; alignment does not matter.
    #[inline(always)]
    unsafe fn store_first(self, to: *mut f32, count: usize) {
        // SAFETY: a register fits the array, and the caller promises the instruction set and writable memory.
        unsafe {
            if count >= Self::COUNT {
                self.store(to);
            } else {
                let mut all = [0.0; MAX_LANES];
                self.store(all.as_mut_ptr());
                std::ptr::copy_nonoverlapping(all.as_ptr(), to, count);
            }
        }
    }
}

/// The register of a processor of which nothing is known; the compiler maps it to what the target has.
impl Accumulator for [f32; 4] {
    const COUNT: usize = 4;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        [value; 4]
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller promises four readable numbers; an array of f32 is aligned like f32.
        unsafe { from.cast::<Self>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller promises four writable numbers.
        unsafe { to.cast::<Self>().write_unaligned(self) }
    }

    #[inline(always)]
    unsafe fn add_product(mut self, a: Self, b: Self) -> Self {
        for lane in 0..4 {
            self[lane] += a[lane] * b[lane];
        }
        self
    }
}

impl Lanes for [f32; 4] {
    #[inline(always)]
    unsafe fn plus(self, other: Self) -> Self {
        std::array::from_fn(|lane| self[lane] + other[lane])
    }

    #[inline(always)]
    unsafe fn minus(self, other: Self) -> Self {
        std::array::from_fn(|lane| self[lane] - other[lane])
    }

    #[inline(always)]
    unsafe fn sum_lanes(registers: *const f32) -> [f32; 8] {
        let mut sums = [0.0; 8];
        for (at, sum) in sums.iter_mut().enumerate() {
            // SAFETY: the caller promises eight readable registers.
            let [a, b, c, d] = unsafe { Self::load(registers.add(4 * at)) };
            *sum = (a + b) + (c + d);
        }
        sums
    }
}

/// Adds the lanes of eight registers of 8 numbers: neighbours, pairs of them, then halves.
///
/// # Safety
/// The processor has AVX2 and the registers are readable.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn sum_avx2(registers: *const f32) -> [f32; 8] {
    // SAFETY: promised by the caller.
    unsafe {
        let pair = |at: usize| {
            let [a, b] = [
                _mm256_loadu_ps(registers.add(16 * at)),
                _mm256_loadu_ps(registers.add(16 * at + 8)),
            ];
            _mm256_hadd_ps(a, b)
        };
        // Lanes 0 to 3 of each half now belong to registers 0 to 3, or 4 to 7.
        let [low, high] = [_mm256_hadd_ps(pair(0), pair(1)), _mm256_hadd_ps(pair(2), pair(3))];
        let [first, second] = [
            _mm256_permute2f128_ps::<0x20>(low, high),
            _mm256_permute2f128_ps::<0x31>(low, high),
        ];
        let mut out = [0.0; 8];
        _mm256_storeu_ps(out.as_mut_ptr(), _mm256_add_ps(first, second));
        out
    }
}

/// Adds the lanes of eight registers of 16 numbers: the halves of each, then as [`sum_avx2`].
///
/// # Safety
/// The processor has AVX-512 and AVX2, and the registers are readable.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn sum_avx512(registers: *const f32) -> [f32; 8] {
    let mut halves = [0.0; 64];
    // SAFETY: promised by the caller.
    unsafe {
        for at in 0..8 {
            let from = registers.add(16 * at);
            let sum = _mm256_add_ps(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8)));
            _mm256_storeu_ps(halves.as_mut_ptr().add(8 * at), sum);
        }
        sum_avx2(halves.as_ptr())
    }
}

#[cfg(target_arch = "x86_64")]
macro_rules! intel_lanes {
    (
        $register:ty, $count:literal, $splat:ident, $load:ident, $store:ident, $fma:ident, $add:ident, $sub:ident,
        $sum:ident
    ) => {
        impl Accumulator for $register {
            const COUNT: usize = $count;

            #[inline(always)]
            unsafe fn splat(value: f32) -> Self {
                // SAFETY: the caller promises the instruction set.
                unsafe { $splat(value) }
            }

            #[inline(always)]
            unsafe fn load(from: *const f32) -> Self {
                // SAFETY: the caller promises the instruction set and readable memory.
                unsafe { $load(from) }
            }

            #[inline(always)]
            unsafe fn store(self, to: *mut f32) {
                // SAFETY: the caller promises the instruction set and writable memory.
                unsafe { $store(to, self) }
            }

            #[inline(always)]
            unsafe fn add_product(self, a: Self, b: Self) -> Self {
                // SAFETY: the caller promises the instruction set.
                unsafe { $fma(a, b, self) }
            }
        }

        impl Lanes for $register {
            #[inline(always)]
            unsafe fn plus(self, other: Self) -> Self {
                // SAFETY: the caller promises the instruction set.
                unsafe { $add(self, other) }
            }

            #[inline(always)]
            unsafe fn minus(self, other: Self) -> Self {
                // SAFETY: the caller promises the instruction set.
                unsafe { $sub(self, other) }
            }

            #[inline(always)]
            unsafe fn sum_lanes(registers: *const f32) -> [f32; 8] {
                // SAFETY: the caller promises the instruction set and eight readable registers.
                unsafe { $sum(registers) }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
intel_lanes!(
    __m512,
    16,
    _mm512_set1_ps,
    _mm512_loadu_ps,
    _mm512_storeu_ps,
    _mm512_fmadd_ps,
    _mm512_add_ps,
    _mm512_sub_ps,
    sum_avx512
);
#[cfg(target_arch = "x86_64")]
intel_lanes!(
    __m256,
    8,
    _mm256_set1_ps,
    _mm256_loadu_ps,
    _mm256_storeu_ps,
    _mm256_fmadd_ps,
    _mm256_add_ps,
    _mm256_sub_ps,
    sum_avx2
);

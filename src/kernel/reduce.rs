//! Sums whose order of additions depends on the length alone.

/// Chains of additions side by side, so that they fit vector registers.
const CHAINS: usize = 16;

/// Sums in `f64`.
pub fn sum(values: &[f32]) -> f64 {
    sum_of([values], |[v]| v)
}

/// Sums a function of as many slices as it takes arguments, in `f64`.
#[inline(always)]
pub fn sum_of<const N: usize>(slices: [&[f32]; N], f: impl Fn([f64; N]) -> f64) -> f64 {
    let length = slices.iter().map(|s| s.len()).min().unwrap_or(0);
    let whole = length / CHAINS * CHAINS;
    let mut chains = [0.0_f64; CHAINS];
    for start in (0..whole).step_by(CHAINS) {
        let parts: [&[f32; CHAINS]; N] = slices.map(|s| s[start..].first_chunk().expect("start + CHAINS <= length"));
        for (lane, chain) in chains.iter_mut().enumerate() {
            *chain += f(parts.map(|p| f64::from(p[lane])));
        }
    }
    let tail: f64 = (whole..length).map(|i| f(slices.map(|s| f64::from(s[i])))).sum();
    chains.iter().sum::<f64>() + tail
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_every_element_once() {
        for length in [0, 1, 15, 16, 17, 100] {
            let values: Vec<f32> = (0..length).map(|v| v as f32).collect();
            let expected: f64 = (0..length).map(f64::from).sum();
            assert_eq!(sum(&values), expected);
            assert_eq!(sum_of([&values, &values], |[a, b]| a - b), 0.0);
        }
    }

    #[test]
    fn keeps_what_f32_would_lose() {
        let values = vec![0.1_f32; 1 << 20];
        assert!((sum(&values) - f64::from(0.1_f32) * (1 << 20) as f64).abs() < 1e-6);
    }
}

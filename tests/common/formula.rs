//! Weights that follow from their names: section 0 of the golden tensors' description.

/// Makes the values of a tensor whose full name in the other program is `name`.
pub fn values(name: &str, shape: &[usize]) -> Vec<f32> {
    let offset = u64::from(crc32fast::hash(name.as_bytes()));
    let fan_in: usize = shape[1..].iter().product();
    (0..shape.iter().product::<usize>() as u64)
        .map(|j| {
            let a = (j * 2_654_435_761 + offset) % (1 << 32);
            let t = 2.0 * (a as f64 / 4_294_967_296.0) - 1.0;
            let value = match shape.len() {
                1 if name.ends_with(".weight") => 1.0 + 0.1 * t,
                1 => 0.1 * t,
                _ => t * (3.0 / fan_in as f64).sqrt(),
            };
            value as f32
        })
        .collect()
}

//! The operators as compositions of burn's own, for devices that our kernels do not serve.

use burn::tensor::{DType, FloatDType, Tensor, TensorData, activation, module, ops::ConvOptions};

use super::dtype::follow;
use super::loss::{DICE_EPSILON, DiceOver, LossForm};
use super::upsampling::{Axis, Upsampling};
use crate::volume::ClassSet;

/// See [`super::conv3d`].
pub fn conv3d(x: Tensor<5>, weight: Tensor<5>, bias: Tensor<1>, stride: usize) -> Tensor<5> {
    let pad = weight.dims()[2] / 2;
    let options = ConvOptions::new([stride; 3], [pad; 3], [1; 3], 1);
    let (weight, bias) = (follow(weight, &x), follow(bias, &x));
    module::conv3d(x, weight, Some(bias), options)
}

/// See [`super::conv_transpose3d_k2s2`] and [`super::conv_transpose3d_blocks`]; one matrix product, because burn's own
/// kernel is naive on GPUs.
pub fn conv_transpose3d_blocks(x: Tensor<5>, weight: Tensor<5>, bias: Tensor<1>) -> Tensor<5> {
    let [n, ci, d, h, w] = x.dims();
    let [_, co, kd, kh, kw] = weight.dims();
    let block = kd * kh * kw;
    let (weight, bias) = (follow(weight, &x), follow(bias, &x));
    let weight: Tensor<3> = weight.reshape([ci, co * block]).swap_dims(0, 1).unsqueeze();
    let y = weight.expand([n, co * block, ci]).matmul(x.reshape([n, ci, d * h * w]));
    let y: Tensor<8> = y
        .reshape([n, co, kd, kh, kw, d, h, w])
        .permute([0, 1, 5, 2, 6, 3, 7, 4]);
    y.reshape([n, co, d * kd, h * kh, w * kw]) + bias.reshape([1, co, 1, 1, 1])
}

/// See [`super::instance_norm_leaky_relu`]; the statistics and the norm itself are single precision.
pub fn instance_norm_leaky_relu(x: Tensor<5>, gamma: Tensor<2>, beta: Tensor<2>, slope: f64) -> Tensor<5> {
    let [b, c, d, h, w] = x.dims();
    if x.dtype() == DType::BF16 {
        let y = instance_norm_leaky_relu(x.cast(FloatDType::F32), gamma, beta, slope);
        return y.cast(FloatDType::BF16);
    }
    let (gamma, beta) = (follow(gamma, &x), follow(beta, &x));
    let x: Tensor<3> = x.reshape([b, c, d * h * w]);
    let mean = x.clone().mean_dim(2);
    let centred = x - mean;
    let variance = centred.clone().powi_scalar(2).mean_dim(2);
    let y = centred / (variance + super::NORM_EPSILON).sqrt() * gamma.reshape([b, c, 1]) + beta.reshape([b, c, 1]);
    activation::leaky_relu(y.reshape([b, c, d, h, w]), slope)
}

/// See [`super::max_pool3d_k2`].
pub fn max_pool3d_k2(x: Tensor<5>) -> Tensor<5> {
    let [n, c, d, h, w] = x.dims();
    let x: Tensor<4> = x.reshape([n * c, d / 2, 2, h * w]).max_dim(2);
    let x: Tensor<4> = x.reshape([n * c * (d / 2), h / 2, 2, w]).max_dim(2);
    let x: Tensor<2> = x.reshape([n * c * (d / 2) * (h / 2) * (w / 2), 2]).max_dim(1);
    x.reshape([n, c, d / 2, h / 2, w / 2])
}

/// See [`super::upsample3d_x2`].
pub fn upsample3d_x2(x: Tensor<5>, how: Upsampling) -> Tensor<5> {
    (2..5).fold(x, |x, dim| {
        let mut shape = x.dims();
        let [even, odd] = match how {
            Upsampling::Nearest => [x.clone(), x],
            Upsampling::Trilinear { align_corners } => between(x, dim, &Axis::new(shape[dim], align_corners)),
        };
        shape[dim] *= 2;
        Tensor::stack::<6>(vec![even, odd], dim + 1).reshape(shape)
    })
}

/// Interpolates along one axis: its even and its odd voxels.
fn between(x: Tensor<5>, dim: usize, axis: &Axis) -> [Tensor<5>; 2] {
    let n = x.dims()[dim];
    let (first, last) = (x.clone().narrow(dim, 0, 1), x.clone().narrow(dim, n - 1, 1));
    let before = Tensor::cat(vec![first, x.clone()], dim).narrow(dim, 0, n);
    let after = Tensor::cat(vec![x.clone(), last], dim).narrow(dim, 1, n);
    [(&axis.before, before), (&axis.after, after)].map(|(factors, other)| {
        let mut shape = [1; 5];
        shape[dim] = n;
        let factors = Tensor::<5>::from_data(TensorData::new(factors.clone(), shape), &x.device());
        x.clone() + (other - x.clone()) * follow(factors, &x)
    })
}

/// Returns log sum exp over the classes, safe for large logits.
pub fn log_sum_exp(logits: Tensor<5>) -> Tensor<5> {
    // The gradient does not depend on the shift, so none needs to flow through it.
    let shift = logits.clone().max_dim(1).detach();
    (logits - shift.clone()).exp().sum_dim(1).log() + shift
}

/// Sums all elements, axis by axis: in one fixed order, which the CPU backend's `sum` leaves to work stealing from four
/// million elements on, and with less rounding than one long sum.
pub fn total(x: Tensor<5>) -> Tensor<1> {
    x.sum_dim(4).sum_dim(3).sum_dim(2).sum_dim(1).sum_dim(0).reshape([1])
}

/// What every voxel may be: 1 for an admissible class, else 0, shape `[B, C, D, H, W]`.
fn admissible(sets: &[ClassSet], like: &Tensor<5>) -> Tensor<5> {
    let shape = like.dims();
    let voxels: usize = shape[2..].iter().product();
    let samples = sets.chunks_exact(voxels);
    let rows = samples.flat_map(|sets| (0..shape[1]).map(move |class| (sets, class as u8)));
    let values: Vec<f32> = rows
        .flat_map(|(sets, class)| sets.iter().map(move |set| f32::from(u8::from(set.contains(class)))))
        .collect();
    Tensor::from_data(TensorData::new(values, shape), &like.device())
}

/// See [`super::marginal_loss`].
pub fn marginal_loss(logits: Tensor<5>, sets: &[ClassSet], form: &LossForm) -> Tensor<1> {
    let admissible = admissible(sets, &logits);
    let [batch, classes, ..] = logits.dims();
    let members = admissible.clone().sum_dim(1);
    let informed = members.clone().lower_elem(classes as f64 - 0.5).float();
    let known = members.lower_elem(1.5).float();

    let excluded = (admissible.clone() - 1.0) * 1e4;
    let entropy = log_sum_exp(logits.clone()) - log_sum_exp(logits.clone() + excluded);
    let plain = total(entropy.clone() * informed.clone()) / total(informed).clamp_min(1.0);

    // [B, C, N]. Decided: known to be of the class (the only admissible one), or known not to be.
    let truth = (admissible.clone() * known).flatten::<3>(2, 4);
    let decided = truth.clone() + (admissible.neg() + 1.0).flatten::<3>(2, 4);
    let chance = activation::softmax(logits, 1).flatten::<3>(2, 4) * decided;
    let entropy = truth.clone() * entropy.flatten::<3>(2, 4);
    let over_voxels = |x: Tensor<3>| -> Tensor<2> { x.sum_dim(2).reshape([batch, classes]) };
    let [overlap, chance, of_class, size] = [chance.clone() * truth.clone(), chance, entropy, truth].map(over_voxels);

    let of_batch = |x: &Tensor<2>| x.clone().sum_dim(0);
    let held = of_batch(&size).greater_elem(0.5).float();
    let of_class = of_batch(&of_class) / of_batch(&size).clamp_min(1.0);
    let balanced = of_class.sum() / held.sum().clamp_min(1.0);

    let [overlap, chance, size] = match form.dice {
        DiceOver::Batch => [of_batch(&overlap), of_batch(&chance), of_batch(&size)],
        DiceOver::Sample => [overlap, chance, size],
    };
    let counted = match form.absent {
        true => size.ones_like(),
        false => size.clone().greater_elem(0.5).float(),
    };
    let first = usize::from(!form.background);
    let of_classes = |x: Tensor<2>| x.narrow(1, first, classes - first);
    let counted = of_classes(counted);
    let dice = (overlap * 2.0 + DICE_EPSILON) / (chance + size + DICE_EPSILON);
    let dice_loss = ((of_classes(dice).neg() + 1.0) * counted.clone()).sum() / counted.sum().clamp_min(1.0);
    plain * (1.0 - form.balance) + balanced * form.balance + dice_loss
}

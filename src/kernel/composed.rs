//! The operators as compositions of burn's own, for devices that our kernels do not serve.

use burn::tensor::{Tensor, activation, module, ops::ConvOptions};

/// See [`super::conv3d`].
pub fn conv3d(x: Tensor<5>, weight: Tensor<5>, bias: Tensor<1>, stride: usize) -> Tensor<5> {
    let pad = weight.dims()[2] / 2;
    let options = ConvOptions::new([stride; 3], [pad; 3], [1; 3], 1);
    module::conv3d(x, weight, Some(bias), options)
}

/// See [`super::conv_transpose3d_k2s2`]; one matrix product, because burn's own kernel is naive on GPUs.
pub fn conv_transpose3d_k2s2(x: Tensor<5>, weight: Tensor<5>, bias: Tensor<1>) -> Tensor<5> {
    let [n, ci, d, h, w] = x.dims();
    let co = weight.dims()[1];
    let weight: Tensor<3> = weight.reshape([ci, co * 8]).swap_dims(0, 1).unsqueeze();
    let y = weight.expand([n, co * 8, ci]).matmul(x.reshape([n, ci, d * h * w]));
    let y: Tensor<8> = y.reshape([n, co, 2, 2, 2, d, h, w]).permute([0, 1, 5, 2, 6, 3, 7, 4]);
    y.reshape([n, co, 2 * d, 2 * h, 2 * w]) + bias.reshape([1, co, 1, 1, 1])
}

/// See [`super::instance_norm_leaky_relu`].
pub fn instance_norm_leaky_relu(x: Tensor<5>, gamma: Tensor<2>, beta: Tensor<2>, slope: f64) -> Tensor<5> {
    let [b, c, d, h, w] = x.dims();
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

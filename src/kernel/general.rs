//! Convolutions whose kernels and strides differ between axes, which networks planned for thick slices have.

use burn::tensor::ops::{ConvOptions, ConvTransposeOptions};
use burn::tensor::{Tensor, module};

use super::dtype::follow;

/// Convolves with zero padding of half the kernel's side along each axis. Cubic kernels of side 1 and 3 with one stride of
/// 1 or 2 are [`super::conv3d`]; the others are burn's own.
///
/// # Shape
/// x `[B, Ci, D, H, W]`, weight `[Co, Ci, kd, kh, kw]` (odd sides), bias `[Co]` -> `[B, Co, D', H', W']`, D' = D / stride
/// rounded up.
pub fn conv3d_per_axis(x: Tensor<5>, weight: Tensor<5>, bias: Option<Tensor<1>>, stride: [usize; 3]) -> Tensor<5> {
    let [co, _, kd, kh, kw] = weight.dims();
    let is_cubic = kd == kh && kh == kw && stride == [stride[0]; 3];
    if is_cubic {
        let bias = bias.unwrap_or_else(|| Tensor::zeros([co], &weight.device()));
        return super::conv3d(x, weight, bias, stride[0]);
    }
    let options = ConvOptions::new(stride, [kd / 2, kh / 2, kw / 2], [1; 3], 1);
    let (weight, bias) = (follow(weight, &x), bias.map(|bias| follow(bias, &x)));
    module::conv3d(x, weight, bias, options)
}

/// Enlarges by a transposed convolution whose stride is its kernel, so that no two of its blocks overlap.
///
/// # Shape
/// x `[B, Ci, D, H, W]`, weight `[Ci, Co, kd, kh, kw]`, bias `[Co]` -> `[B, Co, D kd, H kh, W kw]`.
pub fn conv_transpose3d_blocks(x: Tensor<5>, weight: Tensor<5>, bias: Option<Tensor<1>>) -> Tensor<5> {
    let [_, co, kd, kh, kw] = weight.dims();
    let bias = bias.unwrap_or_else(|| Tensor::zeros([co], &weight.device()));
    if [kd, kh, kw] == [2; 3] {
        return super::conv_transpose3d_k2s2(x, weight, bias);
    }
    super::composed::conv_transpose3d_blocks(x, weight, bias)
}

/// Enlarges by a transposed convolution with a cubic kernel of side 3, whose blocks overlap; padding as MONAI chooses it, so
/// that sizes are multiplied by the stride.
///
/// # Shape
/// x `[B, Ci, D, H, W]`, weight `[Ci, Co, 3, 3, 3]`, bias `[Co]` -> `[B, Co, D stride, H stride, W stride]`.
pub fn conv_transpose3d_k3(x: Tensor<5>, weight: Tensor<5>, bias: Tensor<1>, stride: usize) -> Tensor<5> {
    let options = ConvTransposeOptions::new([stride; 3], [1; 3], [stride - 1; 3], [1; 3], 1);
    let (weight, bias) = (follow(weight, &x), follow(bias, &x));
    module::conv_transpose3d(x, weight, Some(bias), options)
}

/// Averages blocks of voxels.
///
/// # Shape
/// `[B, C, D, H, W]` (divisible by the block) -> `[B, C, D / bd, H / bh, W / bw]`.
///
/// # Panics
/// When a size is not divisible.
pub fn average_pool3d(x: Tensor<5>, block: [usize; 3]) -> Tensor<5> {
    let [n, c, d, h, w] = x.dims();
    let [bd, bh, bw] = block;
    assert!(
        d % bd == 0 && h % bh == 0 && w % bw == 0,
        "pooling expected sizes divisible by {block:?}, got {:?}",
        [d, h, w]
    );
    let x: Tensor<4> = x.reshape([n * c * (d / bd), bd, h, w]).mean_dim(1);
    let x: Tensor<4> = x.reshape([n * c * (d / bd) * (h / bh), bh, w, 1]).mean_dim(1);
    let x: Tensor<2> = x.reshape([n * c * (d / bd) * (h / bh) * (w / bw), bw]).mean_dim(1);
    x.reshape([n, c, d / bd, h / bh, w / bw])
}

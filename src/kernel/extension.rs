//! The CPU kernels as operators of burn's Flex backend; `autodiff` adds their handwritten gradients.

use std::sync::Arc;

use burn::backend::flex::{FlexTensor, Layout};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Flex, TensorMetadata, backend_extension};
use burn::tensor::{Bytes, DType, Shape};

use super::isa::Isa;
use super::layout::{Channels, Geometry, transpose};
use super::loss::LossForm;
use super::strided::{Strided, halved};
use super::upsampling::{self, Upsampling};
use super::{convolution, loss, norm, pool, transposed, weight_gradient};
use crate::volume::ClassSet;

/// Operators that networks call.
#[backend_extension(Flex, Autodiff)]
pub trait Operators: Backend {
    /// Convolves with stride 1 and padding of half the kernel's side.
    fn same_conv3d(x: FloatTensor<Self>, weight: FloatTensor<Self>, bias: FloatTensor<Self>) -> FloatTensor<Self>;

    /// Convolves as [`Self::same_conv3d`] does, the channels of `second` following those of `first`.
    fn paired_conv3d(
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
    ) -> FloatTensor<Self>;

    /// Convolves with stride 2 and padding of half the kernel's side.
    fn halving_conv3d(x: FloatTensor<Self>, weight: FloatTensor<Self>, bias: FloatTensor<Self>) -> FloatTensor<Self>;

    /// Convolves, transposed, with kernel and stride 2.
    fn doubling_conv3d(x: FloatTensor<Self>, weight: FloatTensor<Self>, bias: FloatTensor<Self>) -> FloatTensor<Self>;

    /// Applies instance norm, affine map and leaky ReLU.
    fn norm_leaky_relu(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        slope: f32,
    ) -> FloatTensor<Self>;

    /// Takes the maximum over blocks of 2x2x2.
    fn halving_max(x: FloatTensor<Self>) -> FloatTensor<Self>;

    /// Doubles the resolution by interpolation.
    fn doubling_interpolation(x: FloatTensor<Self>, how: Upsampling) -> FloatTensor<Self>;

    /// Computes the marginal loss, shape `[1]`.
    fn marginal_loss(logits: FloatTensor<Self>, sets: Arc<[ClassSet]>, form: LossForm) -> FloatTensor<Self>;
}

/// What the norm keeps for its gradients.
pub struct NormInputs<B: Backend> {
    /// The input.
    pub x: FloatTensor<B>,
    /// Means and inverse deviations.
    pub statistics: FloatTensor<B>,
    /// Scales `[B, C]`.
    pub gamma: FloatTensor<B>,
    /// Shifts `[B, C]`.
    pub beta: FloatTensor<B>,
    /// Slope below zero.
    pub slope: f32,
}

/// Gradients of the [`Operators`], first order only.
pub trait OperatorGradients: Backend {
    /// Returns the gradient of [`Operators::same_conv3d`] with respect to x.
    fn same_conv3d_input(gradient: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self>;

    /// Returns the gradient of [`Operators::same_conv3d`] with respect to a weight of side k.
    fn same_conv3d_weight(x: FloatTensor<Self>, gradient: FloatTensor<Self>, k: usize) -> FloatTensor<Self>;

    /// Returns the gradients of [`Operators::paired_conv3d`] with respect to its two inputs, of which the first has
    /// `channels` channels.
    fn paired_conv3d_inputs(
        gradient: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        channels: usize,
    ) -> [FloatTensor<Self>; 2];

    /// Returns the gradient of [`Operators::paired_conv3d`] with respect to a weight of side k.
    fn paired_conv3d_weight(inputs: [FloatTensor<Self>; 2], gradient: FloatTensor<Self>, k: usize)
    -> FloatTensor<Self>;

    /// Returns the gradient of [`Operators::halving_conv3d`] with respect to x of `size` voxels.
    fn halving_conv3d_input(
        gradient: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        size: [usize; 3],
    ) -> FloatTensor<Self>;

    /// Returns the gradient of [`Operators::halving_conv3d`] with respect to a weight of side k.
    fn halving_conv3d_weight(x: FloatTensor<Self>, gradient: FloatTensor<Self>, k: usize) -> FloatTensor<Self>;

    /// Returns the gradients of [`Operators::doubling_conv3d`] with respect to x and weight.
    fn doubling_conv3d_gradients(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
    ) -> [FloatTensor<Self>; 2];

    /// Returns the gradient with respect to a bias: the sum over samples and voxels.
    fn channel_sums(gradient: FloatTensor<Self>) -> FloatTensor<Self>;

    /// Returns the means and inverse deviations that [`Operators::norm_leaky_relu`] uses.
    fn norm_statistics(x: FloatTensor<Self>) -> FloatTensor<Self>;

    /// Completes [`Operators::norm_leaky_relu`].
    fn norm_apply(inputs: NormInputs<Self>) -> FloatTensor<Self>;

    /// Returns the gradients of [`Operators::norm_leaky_relu`] with respect to x, gamma and beta.
    fn norm_gradients(inputs: NormInputs<Self>, gradient: FloatTensor<Self>) -> [FloatTensor<Self>; 3];

    /// Completes [`Operators::halving_max`] and says which voxel of each block was taken.
    fn halving_max_chosen(x: FloatTensor<Self>) -> (FloatTensor<Self>, Arc<Vec<u8>>);

    /// Returns the gradient of [`Operators::halving_max`].
    fn halving_max_gradient(gradient: FloatTensor<Self>, chosen: &[u8]) -> FloatTensor<Self>;

    /// Returns the gradient of [`Operators::doubling_interpolation`].
    fn doubling_interpolation_gradient(gradient: FloatTensor<Self>, how: Upsampling) -> FloatTensor<Self>;

    /// Completes [`Operators::marginal_loss`] and returns its gradient with it.
    fn marginal_loss_gradient(logits: FloatTensor<Self>, sets: &[ClassSet], form: &LossForm) -> [FloatTensor<Self>; 2];
}

/// Returns the numbers of a contiguous tensor.
fn values(tensor: &FlexTensor) -> &[f32] {
    let (start, end) = tensor
        .layout()
        .contiguous_offsets()
        .expect("made contiguous by the caller");
    &tensor.storage::<f32>()[start..end]
}

/// Makes a tensor of numbers.
fn tensor<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> FlexTensor {
    FlexTensor::new(
        Bytes::from_elems(values),
        Layout::contiguous(Shape::from(shape)),
        DType::F32,
    )
}

/// Describes a convolution of x.
fn geometry(x: &FlexTensor, co: usize, k: usize) -> Geometry {
    let [_, ci, d, h, w] = x.shape().dims();
    Geometry {
        ci,
        co,
        k,
        size: [d, h, w],
    }
}

/// Joins the channels of two tensors as input of a convolution.
fn channels<'a>([first, second]: [&'a FlexTensor; 2], g: &Geometry) -> Channels<'a> {
    let counts = [first, second].map(|t| t.shape()[1]);
    assert_eq!(counts[0] + counts[1], g.ci, "a convolution's input channels");
    Channels::pair([values(first), values(second)], counts, g.voxels())
}

impl Operators for Flex {
    fn same_conv3d(x: FlexTensor, weight: FlexTensor, bias: FlexTensor) -> FlexTensor {
        let [x, weight, bias] = [x, weight, bias].map(|t| t.to_contiguous());
        let ([n, _, d, h, w], [co, ci, k, _, _]) = (x.shape().dims(), weight.shape().dims());
        let g = geometry(&x, co, k);
        assert_eq!(g.ci, ci, "a convolution's input channels");
        let out = convolution::forward(Isa::chosen(), &g, values(&x), values(&weight), values(&bias));
        tensor(out, [n, co, d, h, w])
    }

    fn paired_conv3d(first: FlexTensor, second: FlexTensor, weight: FlexTensor, bias: FlexTensor) -> FlexTensor {
        let [first, second, weight, bias] = [first, second, weight, bias].map(|t| t.to_contiguous());
        let ([n, _, d, h, w], [co, ci, k, _, _]) = (first.shape().dims(), weight.shape().dims());
        let g = Geometry {
            ci,
            co,
            k,
            size: [d, h, w],
        };
        let out = convolution::of_channels(
            Isa::chosen(),
            &g,
            channels([&first, &second], &g),
            values(&weight),
            values(&bias),
        );
        tensor(out, [n, co, d, h, w])
    }

    fn halving_conv3d(x: FlexTensor, weight: FlexTensor, bias: FlexTensor) -> FlexTensor {
        let [x, weight, bias] = [x, weight, bias].map(|t| t.to_contiguous());
        let ([n, ..], [co, ci, k, _, _]) = (x.shape().dims::<5>(), weight.shape().dims());
        let g = geometry(&x, co, k);
        assert_eq!(g.ci, ci, "a convolution's input channels");
        let out = Strided::new(g).forward(Isa::chosen(), values(&x), values(&weight), values(&bias));
        let [d, h, w] = halved(g.size);
        tensor(out, [n, co, d, h, w])
    }

    fn doubling_conv3d(x: FlexTensor, weight: FlexTensor, bias: FlexTensor) -> FlexTensor {
        let [x, weight, bias] = [x, weight, bias].map(|t| t.to_contiguous());
        let ([n, _, d, h, w], [ci, co, ..]) = (x.shape().dims(), weight.shape().dims::<5>());
        let g = geometry(&x, co, 2);
        assert_eq!(g.ci, ci, "a transposed convolution's input channels");
        let out = transposed::forward(Isa::chosen(), &g, values(&x), values(&weight), values(&bias));
        tensor(out, [n, co, 2 * d, 2 * h, 2 * w])
    }

    fn norm_leaky_relu(mut x: FlexTensor, gamma: FlexTensor, beta: FlexTensor, slope: f32) -> FlexTensor {
        if let (true, Some((start, end))) = (x.is_unique(), x.layout().contiguous_offsets()) {
            let statistics = Self::norm_statistics(x.clone());
            let [gamma, beta] = [gamma, beta].map(|t| t.to_contiguous());
            let parameters = norm::Parameters {
                statistics: values(&statistics),
                gamma: values(&gamma),
                beta: values(&beta),
                slope,
            };
            let [_, _, d, h, w] = x.shape().dims::<5>();
            // Nobody else sees x: its buffer becomes the output's, which spares a buffer and a pass through memory.
            norm::replace(
                Isa::chosen(),
                &mut x.storage_mut::<f32>()[start..end],
                parameters,
                d * h * w,
            );
            return x;
        }
        Self::norm_apply(NormInputs {
            statistics: Self::norm_statistics(x.clone()),
            x,
            gamma,
            beta,
            slope,
        })
    }

    fn halving_max(x: FlexTensor) -> FlexTensor {
        Self::halving_max_chosen(x).0
    }

    fn doubling_interpolation(x: FlexTensor, how: Upsampling) -> FlexTensor {
        let x = x.to_contiguous();
        let [n, c, d, h, w] = x.shape().dims();
        let out = upsampling::forward(Isa::chosen(), how, values(&x), [d, h, w]);
        tensor(out, [n, c, 2 * d, 2 * h, 2 * w])
    }

    fn marginal_loss(logits: FlexTensor, sets: Arc<[ClassSet]>, form: LossForm) -> FlexTensor {
        let [loss, _] = Self::marginal_loss_gradient(logits, &sets, &form);
        loss
    }
}

/// Calls `f` with the numbers of a norm's inputs and the voxels of one channel.
fn with_norm_inputs<R>(inputs: NormInputs<Flex>, f: impl FnOnce(&[f32], norm::Parameters, usize) -> R) -> R {
    let [x, gamma, beta] = [inputs.x, inputs.gamma, inputs.beta].map(|t| t.to_contiguous());
    let [_, _, d, h, w] = x.shape().dims::<5>();
    let parameters = norm::Parameters {
        statistics: values(&inputs.statistics),
        gamma: values(&gamma),
        beta: values(&beta),
        slope: inputs.slope,
    };
    f(values(&x), parameters, d * h * w)
}

impl OperatorGradients for Flex {
    fn same_conv3d_input(gradient: FlexTensor, weight: FlexTensor) -> FlexTensor {
        let [gradient, weight] = [gradient, weight].map(|t| t.to_contiguous());
        let ([n, co, d, h, w], [_, ci, k, _, _]) = (gradient.shape().dims(), weight.shape().dims());
        let g = geometry(&gradient, ci, k);
        debug_assert_eq!(g.ci, co);
        let out = convolution::input_gradient(Isa::chosen(), &g.transposed(), values(&gradient), values(&weight));
        tensor(out, [n, ci, d, h, w])
    }

    fn same_conv3d_weight(x: FlexTensor, gradient: FlexTensor, k: usize) -> FlexTensor {
        let [x, gradient] = [x, gradient].map(|t| t.to_contiguous());
        let g = geometry(&x, gradient.shape()[1], k);
        let out = weight_gradient::weight(Isa::chosen(), &g, values(&x), values(&gradient));
        tensor(out, [g.co, g.ci, k, k, k])
    }

    fn paired_conv3d_inputs(gradient: FlexTensor, weight: FlexTensor, channels: usize) -> [FlexTensor; 2] {
        let [gradient, weight] = [gradient, weight].map(|t| t.to_contiguous());
        let ([n, co, d, h, w], [_, ci, k, _, _]) = (gradient.shape().dims(), weight.shape().dims::<5>());
        let back = transpose(values(&weight), &geometry(&gradient, ci, k).transposed());
        let (first, second) = back.split_at(channels * co * k * k * k);
        [(first, channels), (second, ci - channels)].map(|(weight, count)| {
            let g = geometry(&gradient, count, k);
            let out = convolution::forward(Isa::chosen(), &g, values(&gradient), weight, &[]);
            tensor(out, [n, count, d, h, w])
        })
    }

    fn paired_conv3d_weight(inputs: [FlexTensor; 2], gradient: FlexTensor, k: usize) -> FlexTensor {
        let gradient = gradient.to_contiguous();
        let [first, second] = inputs.map(|t| t.to_contiguous());
        let [_, co, d, h, w] = gradient.shape().dims();
        let g = Geometry {
            ci: first.shape()[1] + second.shape()[1],
            co,
            k,
            size: [d, h, w],
        };
        let x = channels([&first, &second], &g);
        let out = weight_gradient::of_channels(Isa::chosen(), &g, x, values(&gradient));
        tensor(out, [co, g.ci, k, k, k])
    }

    fn halving_conv3d_input(gradient: FlexTensor, weight: FlexTensor, size: [usize; 3]) -> FlexTensor {
        let [gradient, weight] = [gradient, weight].map(|t| t.to_contiguous());
        let ([n, ..], [co, ci, k, _, _]) = (gradient.shape().dims::<5>(), weight.shape().dims());
        let strided = Strided::new(Geometry { ci, co, k, size });
        let dx = strided.input_gradient(Isa::chosen(), values(&gradient), values(&weight));
        tensor(dx, [n, ci, size[0], size[1], size[2]])
    }

    fn halving_conv3d_weight(x: FlexTensor, gradient: FlexTensor, k: usize) -> FlexTensor {
        let [x, gradient] = [x, gradient].map(|t| t.to_contiguous());
        let g = geometry(&x, gradient.shape()[1], k);
        let dw = Strided::new(g).weight_gradient(Isa::chosen(), values(&x), values(&gradient));
        tensor(dw, [g.co, g.ci, k, k, k])
    }

    fn doubling_conv3d_gradients(x: FlexTensor, weight: FlexTensor, gradient: FlexTensor) -> [FlexTensor; 2] {
        let [x, weight, gradient] = [x, weight, gradient].map(|t| t.to_contiguous());
        let g = geometry(&x, gradient.shape()[1], 2);
        let [dx, dw] = transposed::gradients(Isa::chosen(), &g, values(&x), values(&gradient), values(&weight));
        [
            tensor(dx, x.shape().dims::<5>()),
            tensor(dw, weight.shape().dims::<5>()),
        ]
    }

    fn channel_sums(gradient: FlexTensor) -> FlexTensor {
        let gradient = gradient.to_contiguous();
        let [_, co, d, h, w] = gradient.shape().dims();
        tensor(weight_gradient::bias(values(&gradient), co, d * h * w), [co])
    }

    fn norm_statistics(x: FlexTensor) -> FlexTensor {
        let x = x.to_contiguous();
        let [b, c, d, h, w] = x.shape().dims();
        tensor(norm::statistics(Isa::chosen(), values(&x), d * h * w), [b, c, 2])
    }

    fn norm_apply(inputs: NormInputs<Self>) -> FlexTensor {
        let shape: [usize; 5] = inputs.x.shape().dims();
        let out = with_norm_inputs(inputs, |x, parameters, voxels| {
            norm::forward(Isa::chosen(), x, parameters, voxels)
        });
        tensor(out, shape)
    }

    fn norm_gradients(inputs: NormInputs<Self>, gradient: FlexTensor) -> [FlexTensor; 3] {
        let gradient = gradient.to_contiguous();
        let shape: [usize; 5] = inputs.x.shape().dims();
        let [dx, gamma, beta] = with_norm_inputs(inputs, |x, parameters, voxels| {
            norm::gradients(Isa::chosen(), x, values(&gradient), parameters, voxels)
        });
        let rows = [shape[0], shape[1]];
        [tensor(dx, shape), tensor(gamma, rows), tensor(beta, rows)]
    }

    fn halving_max_chosen(x: FlexTensor) -> (FlexTensor, Arc<Vec<u8>>) {
        let x = x.to_contiguous();
        let [n, c, d, h, w] = x.shape().dims();
        let (out, chosen) = pool::forward(Isa::chosen(), values(&x), [d, h, w]);
        (tensor(out, [n, c, d / 2, h / 2, w / 2]), Arc::new(chosen))
    }

    fn halving_max_gradient(gradient: FlexTensor, chosen: &[u8]) -> FlexTensor {
        let gradient = gradient.to_contiguous();
        let [n, c, d, h, w] = gradient.shape().dims();
        let size = [2 * d, 2 * h, 2 * w];
        let dx = pool::gradient(values(&gradient), chosen, size);
        tensor(dx, [n, c, size[0], size[1], size[2]])
    }

    fn doubling_interpolation_gradient(gradient: FlexTensor, how: Upsampling) -> FlexTensor {
        let gradient = gradient.to_contiguous();
        let [n, c, d, h, w] = gradient.shape().dims();
        let size = [d / 2, h / 2, w / 2];
        let dx = upsampling::gradient(Isa::chosen(), how, values(&gradient), size);
        tensor(dx, [n, c, size[0], size[1], size[2]])
    }

    fn marginal_loss_gradient(logits: FlexTensor, sets: &[ClassSet], form: &LossForm) -> [FlexTensor; 2] {
        let logits = logits.to_contiguous();
        let shape: [usize; 5] = logits.shape().dims();
        let voxels = shape[2..].iter().product();
        let (loss, gradient) = loss::marginal(Isa::chosen(), values(&logits), (sets, form), [shape[1], voxels]);
        [tensor(vec![loss], [1]), tensor(gradient, shape)]
    }
}

//! The CPU kernels as operators of burn's Flex backend, with their handwritten gradients.

use burn::backend::autodiff::{
    NodeId,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::flex::{FlexTensor, Layout};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Flex, TensorMetadata, backend_extension};
use burn::tensor::{Bytes, DType, Shape};

use super::isa::Isa;
use super::layout::Geometry;
use super::{convolution, weight_gradient};

/// Operators that networks call.
#[backend_extension(Flex, Autodiff)]
pub trait Operators: Backend {
    /// Convolves with stride 1 and padding of half the kernel's side.
    fn same_conv3d(x: FloatTensor<Self>, weight: FloatTensor<Self>, bias: FloatTensor<Self>) -> FloatTensor<Self>;
}

/// Gradients of the [`Operators`], first order only.
pub trait OperatorGradients: Backend {
    /// Returns the gradient with respect to x.
    fn same_conv3d_input(gradient: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self>;

    /// Returns the gradient with respect to a weight of side k.
    fn same_conv3d_weight(x: FloatTensor<Self>, gradient: FloatTensor<Self>, k: usize) -> FloatTensor<Self>;

    /// Returns the gradient with respect to the bias: the sum over samples and voxels.
    fn channel_sums(gradient: FloatTensor<Self>) -> FloatTensor<Self>;
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

fn geometry(x: [usize; 5], co: usize, k: usize) -> Geometry {
    let [_, ci, d, h, w] = x;
    Geometry {
        ci,
        co,
        k,
        size: [d, h, w],
    }
}

impl Operators for Flex {
    fn same_conv3d(x: FlexTensor, weight: FlexTensor, bias: FlexTensor) -> FlexTensor {
        let [x, weight, bias] = [x, weight, bias].map(|t| t.to_contiguous());
        let ([n, ci, d, h, w], [co, _, k, _, _]) = (x.shape().dims(), weight.shape().dims());
        let g = geometry([n, ci, d, h, w], co, k);
        let out = convolution::forward(Isa::chosen(), &g, values(&x), values(&weight), values(&bias));
        tensor(out, [n, co, d, h, w])
    }
}

impl OperatorGradients for Flex {
    fn same_conv3d_input(gradient: FlexTensor, weight: FlexTensor) -> FlexTensor {
        let [gradient, weight] = [gradient, weight].map(|t| t.to_contiguous());
        let ([n, co, d, h, w], [_, ci, k, _, _]) = (gradient.shape().dims(), weight.shape().dims());
        let g = geometry([n, ci, d, h, w], co, k);
        let out = convolution::input_gradient(Isa::chosen(), &g, values(&gradient), values(&weight));
        tensor(out, [n, ci, d, h, w])
    }

    fn same_conv3d_weight(x: FlexTensor, gradient: FlexTensor, k: usize) -> FlexTensor {
        let [x, gradient] = [x, gradient].map(|t| t.to_contiguous());
        let g = geometry(x.shape().dims(), gradient.shape().dims::<5>()[1], k);
        let out = weight_gradient::weight(Isa::chosen(), &g, values(&x), values(&gradient));
        tensor(out, [g.co, g.ci, k, k, k])
    }

    fn channel_sums(gradient: FlexTensor) -> FlexTensor {
        let gradient = gradient.to_contiguous();
        let [_, co, d, h, w] = gradient.shape().dims();
        tensor(weight_gradient::bias(values(&gradient), co, d * h * w), [co])
    }
}

impl<B: Operators + OperatorGradients, C: CheckpointStrategy> Operators for Autodiff<B, C> {
    fn same_conv3d(x: FloatTensor<Self>, weight: FloatTensor<Self>, bias: FloatTensor<Self>) -> FloatTensor<Self> {
        match SameConv3d
            .prepare::<C>([x.node(), weight.node(), bias.node()])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(mut prep) => {
                let state = (prep.checkpoint(&x), prep.checkpoint(&weight));
                let out = B::same_conv3d(x.into_primitive(), weight.into_primitive(), bias.into_primitive());
                prep.finish(state, out)
            }
            OpsKind::UnTracked(prep) => {
                let out = B::same_conv3d(x.into_primitive(), weight.into_primitive(), bias.into_primitive());
                prep.finish(out)
            }
        }
    }
}

/// The backward step of [`Operators::same_conv3d`].
#[derive(Debug)]
struct SameConv3d;

impl<B: OperatorGradients> Backward<B, 3> for SameConv3d {
    /// Nodes of x and weight.
    type State = (NodeId, NodeId);

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let [x_node, weight_node, bias_node] = ops.parents;
        let gradient = grads.consume::<B>(&ops.node);
        let x: FloatTensor<B> = checkpointer.retrieve_node_output(ops.state.0);
        let weight: FloatTensor<B> = checkpointer.retrieve_node_output(ops.state.1);
        let k = weight.shape()[2];
        if let Some(node) = x_node {
            grads.register::<B>(node.id, B::same_conv3d_input(gradient.clone(), weight));
        }
        if let Some(node) = bias_node {
            grads.register::<B>(node.id, B::channel_sums(gradient.clone()));
        }
        if let Some(node) = weight_node {
            grads.register::<B>(node.id, B::same_conv3d_weight(x, gradient, k));
        }
    }
}

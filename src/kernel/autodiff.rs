//! The gradients of the CPU kernels as backward steps of burn's autodiff.

use std::sync::Arc;

use burn::backend::autodiff::{
    NodeId,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, TensorMetadata};
use burn::tensor::Shape;

use super::extension::{NormInputs, OperatorGradients, Operators};
use super::loss::LossForm;
use super::upsampling::Upsampling;
use crate::volume::ClassSet;

impl<B: Operators + OperatorGradients, C: CheckpointStrategy> Operators for Autodiff<B, C> {
    fn same_conv3d(x: FloatTensor<Self>, weight: FloatTensor<Self>, bias: FloatTensor<Self>) -> FloatTensor<Self> {
        let step = SameConv3d.prepare::<C>([x.node(), weight.node(), bias.node()]);
        match step.compute_bound().stateful() {
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

    fn paired_conv3d(
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let step = PairedConv3d.prepare::<C>([first.node(), second.node(), weight.node(), bias.node()]);
        match step.compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let state = [&first, &second, &weight].map(|t| prep.checkpoint(t));
                let [first, second, weight, bias] = [first, second, weight, bias].map(|t| t.into_primitive());
                prep.finish(state, B::paired_conv3d(first, second, weight, bias))
            }
            OpsKind::UnTracked(prep) => {
                let [first, second, weight, bias] = [first, second, weight, bias].map(|t| t.into_primitive());
                prep.finish(B::paired_conv3d(first, second, weight, bias))
            }
        }
    }

    fn halving_conv3d(x: FloatTensor<Self>, weight: FloatTensor<Self>, bias: FloatTensor<Self>) -> FloatTensor<Self> {
        let step = HalvingConv3d.prepare::<C>([x.node(), weight.node(), bias.node()]);
        match step.compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let state = (prep.checkpoint(&x), prep.checkpoint(&weight));
                let out = B::halving_conv3d(x.into_primitive(), weight.into_primitive(), bias.into_primitive());
                prep.finish(state, out)
            }
            OpsKind::UnTracked(prep) => {
                let out = B::halving_conv3d(x.into_primitive(), weight.into_primitive(), bias.into_primitive());
                prep.finish(out)
            }
        }
    }

    fn doubling_conv3d(x: FloatTensor<Self>, weight: FloatTensor<Self>, bias: FloatTensor<Self>) -> FloatTensor<Self> {
        let step = DoublingConv3d.prepare::<C>([x.node(), weight.node(), bias.node()]);
        match step.compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let state = (prep.checkpoint(&x), prep.checkpoint(&weight));
                let out = B::doubling_conv3d(x.into_primitive(), weight.into_primitive(), bias.into_primitive());
                prep.finish(state, out)
            }
            OpsKind::UnTracked(prep) => {
                let out = B::doubling_conv3d(x.into_primitive(), weight.into_primitive(), bias.into_primitive());
                prep.finish(out)
            }
        }
    }

    fn norm_leaky_relu(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        slope: f32,
    ) -> FloatTensor<Self> {
        let step = NormLeakyRelu.prepare::<C>([x.node(), gamma.node(), beta.node()]);
        match step.compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let nodes = [prep.checkpoint(&x), prep.checkpoint(&gamma), prep.checkpoint(&beta)];
                let x = x.into_primitive();
                let statistics = B::norm_statistics(x.clone());
                let out = B::norm_apply(NormInputs {
                    x,
                    statistics: statistics.clone(),
                    gamma: gamma.into_primitive(),
                    beta: beta.into_primitive(),
                    slope,
                });
                prep.finish((nodes, statistics, slope), out)
            }
            OpsKind::UnTracked(prep) => {
                let out = B::norm_leaky_relu(x.into_primitive(), gamma.into_primitive(), beta.into_primitive(), slope);
                prep.finish(out)
            }
        }
    }

    fn halving_max(x: FloatTensor<Self>) -> FloatTensor<Self> {
        match HalvingMax.prepare::<C>([x.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let (out, chosen) = B::halving_max_chosen(x.into_primitive());
                prep.finish(chosen, out)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::halving_max(x.into_primitive())),
        }
    }

    fn doubling_interpolation(x: FloatTensor<Self>, how: Upsampling) -> FloatTensor<Self> {
        let step = DoublingInterpolation.prepare::<C>([x.node()]);
        match step.compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(how, B::doubling_interpolation(x.into_primitive(), how)),
            OpsKind::UnTracked(prep) => prep.finish(B::doubling_interpolation(x.into_primitive(), how)),
        }
    }

    fn marginal_loss(logits: FloatTensor<Self>, sets: Arc<[ClassSet]>, form: LossForm) -> FloatTensor<Self> {
        match MarginalLoss.prepare::<C>([logits.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let [loss, gradient] = B::marginal_loss_gradient(logits.into_primitive(), &sets, &form);
                prep.finish(gradient, loss)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::marginal_loss(logits.into_primitive(), sets, form)),
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
        // The gradient of an image is never asked for, so the first layer's is never computed.
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

/// The backward step of [`Operators::paired_conv3d`].
#[derive(Debug)]
struct PairedConv3d;

impl<B: OperatorGradients> Backward<B, 4> for PairedConv3d {
    /// Nodes of the two inputs and the weight.
    type State = [NodeId; 3];

    fn backward(self, ops: Ops<Self::State, 4>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let [first_node, second_node, weight_node, bias_node] = ops.parents;
        let gradient = grads.consume::<B>(&ops.node);
        let [first, second, weight] = ops
            .state
            .map(|node| checkpointer.retrieve_node_output::<FloatTensor<B>>(node));
        let k = weight.shape()[2];
        if first_node.is_some() || second_node.is_some() {
            let parts = B::paired_conv3d_inputs(gradient.clone(), weight, first.shape()[1]);
            for (node, part) in [first_node, second_node].into_iter().zip(parts) {
                if let Some(node) = node {
                    grads.register::<B>(node.id, part);
                }
            }
        }
        if let Some(node) = bias_node {
            grads.register::<B>(node.id, B::channel_sums(gradient.clone()));
        }
        if let Some(node) = weight_node {
            grads.register::<B>(node.id, B::paired_conv3d_weight([first, second], gradient, k));
        }
    }
}

/// The backward step of [`Operators::halving_conv3d`].
#[derive(Debug)]
struct HalvingConv3d;

impl<B: OperatorGradients> Backward<B, 3> for HalvingConv3d {
    /// Nodes of x and weight.
    type State = (NodeId, NodeId);

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let [x_node, weight_node, bias_node] = ops.parents;
        let gradient = grads.consume::<B>(&ops.node);
        let x: FloatTensor<B> = checkpointer.retrieve_node_output(ops.state.0);
        let weight: FloatTensor<B> = checkpointer.retrieve_node_output(ops.state.1);
        let ([_, _, d, h, w], k) = (x.shape().dims(), weight.shape()[2]);
        if let Some(node) = x_node {
            let dx = B::halving_conv3d_input(gradient.clone(), weight, [d, h, w]);
            grads.register::<B>(node.id, dx);
        }
        if let Some(node) = bias_node {
            grads.register::<B>(node.id, B::channel_sums(gradient.clone()));
        }
        if let Some(node) = weight_node {
            grads.register::<B>(node.id, B::halving_conv3d_weight(x, gradient, k));
        }
    }
}

/// The backward step of [`Operators::doubling_conv3d`].
#[derive(Debug)]
struct DoublingConv3d;

impl<B: OperatorGradients> Backward<B, 3> for DoublingConv3d {
    /// Nodes of x and weight.
    type State = (NodeId, NodeId);

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let [x_node, weight_node, bias_node] = ops.parents;
        let gradient = grads.consume::<B>(&ops.node);
        let x: FloatTensor<B> = checkpointer.retrieve_node_output(ops.state.0);
        let weight: FloatTensor<B> = checkpointer.retrieve_node_output(ops.state.1);
        if let Some(node) = bias_node {
            grads.register::<B>(node.id, B::channel_sums(gradient.clone()));
        }
        if x_node.is_some() || weight_node.is_some() {
            let [dx, dw] = B::doubling_conv3d_gradients(x, weight, gradient);
            for (node, gradient) in [(x_node, dx), (weight_node, dw)] {
                if let Some(node) = node {
                    grads.register::<B>(node.id, gradient);
                }
            }
        }
    }
}

/// The backward step of [`Operators::norm_leaky_relu`].
#[derive(Debug)]
struct NormLeakyRelu;

impl<B: OperatorGradients> Backward<B, 3> for NormLeakyRelu {
    /// Nodes of x, gamma and beta; the statistics; the slope.
    type State = ([NodeId; 3], FloatTensor<B>, f32);

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let gradient = grads.consume::<B>(&ops.node);
        let ([x, gamma, beta], statistics, slope) = ops.state;
        let inputs = NormInputs {
            x: checkpointer.retrieve_node_output(x),
            statistics,
            gamma: checkpointer.retrieve_node_output(gamma),
            beta: checkpointer.retrieve_node_output(beta),
            slope,
        };
        for (node, gradient) in ops.parents.into_iter().zip(B::norm_gradients(inputs, gradient)) {
            if let Some(node) = node {
                grads.register::<B>(node.id, gradient);
            }
        }
    }
}

/// The backward step of [`Operators::halving_max`].
#[derive(Debug)]
struct HalvingMax;

impl<B: OperatorGradients> Backward<B, 1> for HalvingMax {
    /// The voxel chosen in each block.
    type State = Arc<Vec<u8>>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [x_node] = ops.parents;
        let gradient = grads.consume::<B>(&ops.node);
        if let Some(node) = x_node {
            grads.register::<B>(node.id, B::halving_max_gradient(gradient, &ops.state));
        }
    }
}

/// The backward step of [`Operators::doubling_interpolation`].
#[derive(Debug)]
struct DoublingInterpolation;

impl<B: OperatorGradients> Backward<B, 1> for DoublingInterpolation {
    type State = Upsampling;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [x_node] = ops.parents;
        let gradient = grads.consume::<B>(&ops.node);
        if let Some(node) = x_node {
            grads.register::<B>(node.id, B::doubling_interpolation_gradient(gradient, ops.state));
        }
    }
}

/// The backward step of [`Operators::marginal_loss`].
#[derive(Debug)]
struct MarginalLoss;

impl<B: OperatorGradients> Backward<B, 1> for MarginalLoss {
    /// The loss's gradient with respect to the logits.
    type State = FloatTensor<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [logits_node] = ops.parents;
        let gradient = grads.consume::<B>(&ops.node);
        if let Some(node) = logits_node {
            let factor = B::float_reshape(gradient, Shape::from([1, 1, 1, 1, 1]));
            grads.register::<B>(node.id, B::float_mul(ops.state, factor));
        }
    }
}

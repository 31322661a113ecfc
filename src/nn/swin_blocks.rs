//! Blocks of shifted-window transformers; tokens are `[B, D, H, W, C]`, channels last.

use burn::module::{Module, Param};
use burn::tensor::{Device, Int, Tensor, TensorData, activation};

use super::blocks::Init;

/// Added to the variance by layer norms, as in PyTorch.
const EPSILON: f64 = 1e-5;
/// Added to the logits of tokens that a shift brought into one window but that are not neighbours.
const APART: f32 = -100.0;

/// A matrix and a bias on the last axis.
#[derive(Module, Debug)]
pub struct Linear {
    weight: Param<Tensor<2>>,
    bias: Option<Param<Tensor<1>>>,
}

impl Linear {
    /// Makes the block from sizes in and out.
    pub fn new(init: &mut Init, [from, to]: [usize; 2], bias: bool) -> Self {
        Self {
            weight: init.he([to, from], from, 1.0),
            bias: bias.then(|| init.constant(to, 0.0)),
        }
    }

    /// # Shape
    /// `[N, from]` -> `[N, to]`.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let y = x.matmul(self.weight.val().swap_dims(0, 1));
        match &self.bias {
            Some(bias) => y + bias.val().unsqueeze::<2>(),
            None => y,
        }
    }

    /// # Shape
    /// `[B, D, H, W, from]` -> `[B, D, H, W, to]`.
    fn on_tokens(&self, x: Tensor<5>) -> Tensor<5> {
        let [b, d, h, w, c] = x.dims();
        let y = self.forward(x.reshape([b * d * h * w, c]));
        let to = y.dims()[1];
        y.reshape([b, d, h, w, to])
    }
}

/// Normalises every token over its channels.
pub fn normalise_tokens(x: Tensor<5>) -> Tensor<5> {
    let centred = x.clone() - x.mean_dim(4);
    let variance = centred.clone().powi_scalar(2).mean_dim(4);
    centred / (variance + EPSILON).sqrt()
}

/// [`normalise_tokens`], scaled and shifted.
#[derive(Module, Debug)]
pub struct TokenNorm {
    gamma: Param<Tensor<1>>,
    beta: Param<Tensor<1>>,
}

impl TokenNorm {
    /// Makes the norm of `channels`.
    pub fn new(init: &mut Init, channels: usize) -> Self {
        Self {
            gamma: init.constant(channels, 1.0),
            beta: init.constant(channels, 0.0),
        }
    }

    /// # Shape
    /// Keeps `[B, D, H, W, C]`.
    pub fn forward(&self, x: Tensor<5>) -> Tensor<5> {
        normalise_tokens(x) * self.gamma.val().unsqueeze::<5>() + self.beta.val().unsqueeze::<5>()
    }
}

/// How a grid of tokens is cut into windows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Windows {
    /// The window along every axis.
    pub size: [usize; 3],
    /// How far the grid is rolled before it is cut.
    pub shift: [usize; 3],
}

impl Windows {
    /// Cuts a grid; along an axis that a window covers there is neither a larger window nor a shift.
    pub fn of_grid(grid: [usize; 3], window: usize, is_shifted: bool) -> Self {
        let covers = |axis: usize| grid[axis] <= window;
        Self {
            size: std::array::from_fn(|axis| if covers(axis) { grid[axis] } else { window }),
            shift: std::array::from_fn(|axis| if covers(axis) || !is_shifted { 0 } else { window / 2 }),
        }
    }

    fn padded(self, grid: [usize; 3]) -> [usize; 3] {
        std::array::from_fn(|axis| grid[axis].next_multiple_of(self.size[axis]))
    }

    fn is_shifted(self) -> bool {
        self.shift.iter().any(|shift| *shift > 0)
    }

    /// # Shape
    /// `[B, D, H, W, C]` -> `[B N, n, C]`: N windows of n tokens.
    fn cut(self, x: Tensor<5>) -> Tensor<3> {
        let [b, d, h, w, c] = x.dims();
        let [sd, sh, sw] = self.size;
        let x: Tensor<8> = x.reshape([b, d / sd, sd, h / sh, sh, w / sw, sw, c]);
        x.permute([0, 1, 3, 5, 2, 4, 6, 7])
            .reshape([b * (d / sd) * (h / sh) * (w / sw), sd * sh * sw, c])
    }

    /// Undoes [`Self::cut`].
    fn join(self, x: Tensor<3>, [b, d, h, w, c]: [usize; 5]) -> Tensor<5> {
        let [sd, sh, sw] = self.size;
        let x: Tensor<8> = x.reshape([b, d / sd, h / sh, w / sw, sd, sh, sw, c]);
        x.permute([0, 1, 4, 2, 5, 3, 6, 7]).reshape([b, d, h, w, c])
    }

    /// Returns what keeps tokens apart that the roll brought into one window, `[N, n, n]`.
    fn mask(self, grid: [usize; 3], device: &Device) -> Tensor<3> {
        let region = |axis: usize, at: usize| {
            let (length, size, shift) = (grid[axis], self.size[axis], self.shift[axis]);
            if shift == 0 || at < length - size {
                0
            } else {
                1 + usize::from(at >= length - shift)
            }
        };
        let [d, h, w] = grid;
        let mut regions = Vec::with_capacity(d * h * w);
        for (z, y) in (0..d).flat_map(|z| (0..h).map(move |y| (z, y))) {
            regions.extend((0..w).map(|x| (9 * region(0, z) + 3 * region(1, y) + region(2, x)) as f32));
        }
        let regions = Tensor::<5>::from_data(TensorData::new(regions, [1, d, h, w, 1]), device);
        let regions = self.cut(regions);
        let [windows, n, _] = regions.dims();
        let rows = regions.clone().expand([windows, n, n]);
        let apart = rows.not_equal(regions.swap_dims(1, 2).expand([windows, n, n]));
        apart.float() * APART
    }
}

/// Attention among the tokens of a window, with a learned bias per relative position.
#[derive(Module, Debug)]
pub struct WindowAttention {
    qkv: Linear,
    proj: Linear,
    relative: Param<Tensor<2>>,
    #[module(skip)]
    heads: usize,
    #[module(skip)]
    window: usize,
}

impl WindowAttention {
    fn new(init: &mut Init, channels: usize, heads: usize, window: usize) -> Self {
        Self {
            qkv: Linear::new(init, [channels, 3 * channels], true),
            proj: Linear::new(init, [channels; 2], true),
            relative: init.he([(2 * window - 1).pow(3), heads], heads, 0.1),
            heads,
            window,
        }
    }

    /// Returns the bias `[heads, n, n]` of the first n tokens of a full window: windows that a small grid shrank take that
    /// part of the table too, whatever its tokens' positions, as MONAI does.
    fn bias(&self, n: usize) -> Tensor<3> {
        let (side, window) = (2 * self.window - 1, self.window);
        let position = |token: usize| [token / (window * window), token / window % window, token % window];
        let mut indices = Vec::with_capacity(n * n);
        for (a, b) in (0..n).flat_map(|a| (0..n).map(move |b| (a, b))) {
            let (a, b) = (position(a), position(b));
            let index = (0..3).fold(0, |sum, axis| sum * side + a[axis] + window - 1 - b[axis]);
            indices.push(index as i32);
        }
        let table = self.relative.val();
        let indices = Tensor::<1, Int>::from_data(TensorData::new(indices, [n * n]), &table.device());
        table.select(0, indices).reshape([n, n, self.heads]).permute([2, 0, 1])
    }

    /// # Shape
    /// x `[B N, n, C]`, mask `[N, n, n]` -> like x.
    fn forward(&self, x: Tensor<3>, mask: Option<Tensor<3>>) -> Tensor<3> {
        let [windows, n, c] = x.dims();
        let (heads, each) = (self.heads, c / self.heads);
        let qkv = self.qkv.forward(x.reshape([windows * n, c]));
        let qkv: Tensor<5> = qkv.reshape([windows, n, 3, heads, each]).permute([2, 0, 3, 1, 4]);
        let part = |i: usize| -> Tensor<4> { qkv.clone().narrow(0, i, 1).squeeze_dim(0) };
        let (q, k, v) = (part(0) * libm::pow(each as f64, -0.5), part(1), part(2));
        let mut logits: Tensor<4> = q.matmul(k.swap_dims(2, 3)) + self.bias(n).unsqueeze::<4>();
        if let Some(mask) = mask {
            let per_image = mask.dims()[0];
            let mask: Tensor<5> = mask.reshape([1, per_image, 1, n, n]);
            let mask = mask.cast(logits.dtype());
            let apart: Tensor<5> = logits.reshape([windows / per_image, per_image, heads, n, n]) + mask;
            logits = apart.reshape([windows, heads, n, n]);
        }
        let y: Tensor<4> = activation::softmax(logits, 3).matmul(v);
        let y = self.proj.forward(y.swap_dims(1, 2).reshape([windows * n, c]));
        y.reshape([windows, n, c])
    }
}

/// Attention within windows, then two layers on every token; each beside a skip.
#[derive(Module, Debug)]
pub struct SwinBlock {
    norm1: TokenNorm,
    attention: WindowAttention,
    norm2: TokenNorm,
    widen: Linear,
    narrow: Linear,
    #[module(skip)]
    is_shifted: bool,
}

impl SwinBlock {
    /// Makes the block; every second one of a stage is shifted.
    pub fn new(init: &mut Init, [channels, heads, window]: [usize; 3], is_shifted: bool) -> Self {
        Self {
            norm1: TokenNorm::new(init, channels),
            attention: WindowAttention::new(init, channels, heads, window),
            norm2: TokenNorm::new(init, channels),
            widen: Linear::new(init, [channels, 4 * channels], true),
            narrow: Linear::new(init, [4 * channels, channels], true),
            is_shifted,
        }
    }

    /// # Shape
    /// Keeps `[B, D, H, W, C]`.
    pub fn forward(&self, x: Tensor<5>) -> Tensor<5> {
        let x = x.clone() + self.attend(self.norm1.forward(x));
        let wide = activation::gelu(self.widen.on_tokens(self.norm2.forward(x.clone())));
        x + self.narrow.on_tokens(wide)
    }

    fn attend(&self, x: Tensor<5>) -> Tensor<5> {
        let [b, d, h, w, c] = x.dims();
        let windows = Windows::of_grid([d, h, w], self.attention.window, self.is_shifted);
        let padded @ [pd, ph, pw] = windows.padded([d, h, w]);
        let mut x = x;
        for (axis, (from, to)) in [(d, pd), (h, ph), (w, pw)].into_iter().enumerate() {
            x = padded_end(x, axis + 1, to - from);
        }
        let mask = windows.is_shifted().then(|| windows.mask(padded, &x.device()));
        let shift = |x: Tensor<5>, by: fn(usize, usize) -> usize| {
            (0..3).fold(x, |x, axis| rolled(x, axis + 1, by(windows.shift[axis], padded[axis])))
        };
        let y = self.attention.forward(windows.cut(shift(x, |by, _| by)), mask);
        let y = windows.join(y, [b, pd, ph, pw, c]);
        shift(y, |by, length| (length - by) % length).slice([0..b, 0..d, 0..h, 0..w, 0..c])
    }
}

/// Appends zeros along an axis.
pub fn padded_end(x: Tensor<5>, axis: usize, count: usize) -> Tensor<5> {
    if count == 0 {
        return x;
    }
    let mut shape = x.dims();
    shape[axis] = count;
    let zeros = Tensor::zeros(shape, (&x.device(), x.dtype()));
    Tensor::cat(vec![x, zeros], axis)
}

/// Moves what lies at `by` to the start of an axis, and what was before it to the end.
fn rolled(x: Tensor<5>, axis: usize, by: usize) -> Tensor<5> {
    if by == 0 {
        return x;
    }
    let length = x.dims()[axis];
    let parts = [x.clone().narrow(axis, by, length - by), x.narrow(axis, 0, by)];
    Tensor::cat(parts.into(), axis)
}

/// Halves the resolution: eight tokens side by side, normalised, become one of twice the channels.
#[derive(Module, Debug)]
pub struct Merge {
    norm: TokenNorm,
    reduction: Linear,
}

impl Merge {
    /// Makes the block.
    pub fn new(init: &mut Init, channels: usize) -> Self {
        Self {
            norm: TokenNorm::new(init, 8 * channels),
            reduction: Linear::new(init, [8 * channels, 2 * channels], false),
        }
    }

    /// # Shape
    /// `[B, D, H, W, C]` (even sizes) -> `[B, D/2, H/2, W/2, 2C]`; `order` lists the offsets of the eight tokens.
    pub fn forward(&self, x: Tensor<5>, order: &[[usize; 3]; 8]) -> Tensor<5> {
        let [b, d, h, w, c] = x.dims();
        let x: Tensor<8> = x.reshape([b, d / 2, 2, h / 2, 2, w / 2, 2, c]);
        let token = |[z, y, at]: &[usize; 3]| -> Tensor<5> {
            let x = x.clone().narrow(2, *z, 1).narrow(4, *y, 1).narrow(6, *at, 1);
            x.reshape([b, d / 2, h / 2, w / 2, c])
        };
        let eight = Tensor::cat(order.iter().map(token).collect(), 4);
        self.reduction.on_tokens(self.norm.forward(eight))
    }
}

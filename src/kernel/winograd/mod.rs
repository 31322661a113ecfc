//! 3D convolution with a kernel of side 3 and stride 1 on the CPU, by minimal filtering along z and y.
//!
//! A tile of 2 x 2 rows of the output, along z and y, comes from 4 x 4 rows of the input. Rows stay rows: the filters of
//! Winograd's F(2, 3) only add and subtract whole rows, and along x the three taps are three shifted reads. A tile then
//! costs 16 x 3 products per voxel column where the direct sum costs 4 x 27: 2.25 times fewer.
//!
//! Legend: a *point* is one of the 16 combinations of filtered rows; V holds the input's, U the weights', M the output's:
//! `M[point][co]` = sum over ci and taps along x of `U[point][co][ci][tap]` `V[point][ci]` shifted by the tap. A *unit* is
//! a box of tiles whose rows are laid one after the other, each with a zero before and after it, so that one long row
//! of *columns* holds them all; what is computed for the columns between two rows is not used.
//!
//! Every output is one chain of additions, whatever the threads, the batch, or the units.
//!
//! # Source
//! Lavin and Gray, arXiv 1509.09308, section 4.1: B^T, G and A^T of F(2, 3).
//! Departure: two of the three axes. The third would save another third of the products and cost shuffles within rows.

mod forward;
mod gradient;
mod unit;

use super::layout::Geometry;

pub use forward::forward;
pub use gradient::weight;

/// Combinations of filtered rows.
const POINTS: usize = 16;

/// Taps along x.
const TAPS: usize = 3;

/// Returns whether filtering beats the direct sum: below four channels of input its own additions outweigh what it saves.
pub fn pays(g: &Geometry) -> bool {
    g.k == 3 && g.ci >= 4
}

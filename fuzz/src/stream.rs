//! The part of `src/stream` that requests are made of.

#[path = "../../src/stream/cursor.rs"]
pub mod cursor;
#[path = "../../src/stream/delivery.rs"]
pub mod delivery;
#[path = "../../src/stream/encoded.rs"]
pub mod encoded;
/// Stands in for a module that asks the critic.
pub mod negatives {
    /// What a hidden tumour in an unlabelled host means.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
    #[serde(rename_all = "snake_case")]
    pub enum UnlabelledNegatives {
        /// There is none.
        Trust,
        /// It may be anywhere.
        Ignore,
        /// It is where the critic calls tumour.
        Critic,
    }
}
#[path = "../../src/stream/patch.rs"]
pub mod patch;
#[path = "../../src/stream/recipe.rs"]
pub mod recipe;

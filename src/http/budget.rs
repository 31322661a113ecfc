//! How much work the streams and batches of one key may ask for at the same time.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::keys::Caller;
use super::problem::{Problem, ProblemKind};
use crate::stream::Resolved;
use crate::stream::delivery::Delivery;

/// Returns the voxels that a batch may cost: patch voxels x attempts x batch size.
pub(super) fn batch_voxels(resolved: &Resolved, delivery: &Delivery) -> u64 {
    let gate = &resolved.recipe.gate;
    let attempts = if gate.enabled { u64::from(gate.retries) + 1 } else { 1 };
    let sides = resolved.patch.iter().map(|side| *side as u64);
    sides
        .chain([attempts, delivery.batch_size.into()])
        .fold(1, u64::saturating_mul)
}

/// The voxels that each caller's open requests may cost together.
pub(super) struct Budget {
    limit: u64,
    used: Mutex<HashMap<Caller, u64>>,
}

/// A part of a budget, given back when dropped.
pub(super) struct Share {
    budget: Arc<Budget>,
    caller: Caller,
    voxels: u64,
}

impl Budget {
    pub fn new(limit: u64) -> Arc<Self> {
        Arc::new(Self {
            limit,
            used: Mutex::default(),
        })
    }

    /// Takes a part of the caller's budget, or says when to try again.
    pub fn take(self: &Arc<Self>, caller: Caller, voxels: u64, retry_after: u32) -> Result<Share, Problem> {
        let limit = self.limit;
        if voxels > limit {
            let detail = format!(
                "delivery field batch_size: expected patch voxels x attempts x batch size of at most {limit}, got {voxels}"
            );
            return Err(Problem::field("delivery.batch_size", detail));
        }
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let held = used.get(&caller).copied().unwrap_or(0);
        if voxels > limit - held {
            let detail =
                format!("{held} of {limit} voxels are being worked on for this key, and this is {voxels} more");
            return Err(Problem::new(ProblemKind::Budget, detail).retry_after(retry_after));
        }
        used.insert(caller, held + voxels);
        drop(used);
        Ok(Share {
            budget: self.clone(),
            caller,
            voxels,
        })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut used = self.budget.used.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(held) = used.get_mut(&self.caller) {
            *held -= self.voxels;
            if *held == 0 {
                used.remove(&self.caller);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_caller_has_a_budget_of_its_own_and_gets_it_back() {
        let budget = Budget::new(10);
        let take = |caller, voxels| budget.take(caller, voxels, 3);
        let first = take(Caller::Reader(0), 6).unwrap();
        let refused = take(Caller::Reader(0), 5).err().unwrap();
        assert_eq!((refused.status, refused.retry_after_seconds), (429, Some(3)));
        let other = take(Caller::Reader(1), 10).unwrap();
        drop(first);
        let whole = take(Caller::Reader(0), 10).unwrap();
        assert_eq!(take(Caller::Anyone, 11).err().unwrap().status, 422);
        drop((other, whole));
        assert!(budget.used.lock().unwrap().is_empty());
    }
}

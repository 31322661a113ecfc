//! Checks a recipe against the store and the models and fills in what is absent.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::donors::Donors;
use super::leak::{self, Seen};
use super::negatives::UnlabelledNegatives;
use super::recipe::{Fallback, REVISION, Recipe};
use super::{Resolved, StreamError};
use crate::checkpoint::Bundle;
use crate::digest::Digest;
use crate::kernel;
use crate::nn::CubeSides;
use crate::sampler::{Mix, Pool, Schedule, Warp};
use crate::store::{CaseKind, Cases};
use crate::synth::{GateRule, GridBridge, SynthesizerKind};
use crate::volume::{Organ, Plan, Shape, SizeClass};

/// The most visits of a round (128 MiB): 100,000 cases, 41 times each.
const MAX_ROUND_VISITS: usize = 1 << 22;

/// A resolved recipe with what follows from it.
pub(super) struct Prepared {
    pub(super) resolved: Arc<Resolved>,
    pub(super) mix: Mix,
    pub(super) schedule: Schedule,
    /// Voxel size (z, y, x) of the models in mm; the store's where the recipe needs no models.
    pub(super) models_mm: [f64; 3],
    /// Sides of the models' cubes; the default ones where the recipe needs no models.
    pub(super) cubes: CubeSides,
    /// The boxes in which lesions of [`SizeClass::ALL`] are looked at, in the store's voxels.
    pub(super) box_voxels: [Shape; 4],
    /// What copy-paste draws from.
    pub(super) donors: Donors,
    /// What the fallback `real` draws from, by organ id.
    pub(super) real_cases: BTreeMap<u8, Vec<usize>>,
}

/// The most voxels that one warped patch may read. Without a warp the largest patch has 57 million.
const MAX_WARP_READ: u64 = 96 << 20;

fn infeasible<T>(field: &'static str, what: impl Into<String>) -> Result<T, StreamError> {
    Err(StreamError::Infeasible {
        field,
        what: what.into(),
    })
}

/// Bounds what a warped patch reads, which each thread that prepares patches holds some ten bytes a voxel of (promise P3).
fn check_warp(recipe: &Recipe, plan: &Plan) -> Result<(), StreamError> {
    let patch = recipe.patch(plan);
    let most = Warp::most_read(&recipe.augment, patch, plan.spacing_mm);
    if recipe.augment.warp == 0.0 || most <= MAX_WARP_READ {
        return Ok(());
    }
    let mm = plan.spacing_mm;
    infeasible(
        "augment.warp",
        format!(
            "a warped patch of {patch:?} voxels of {mm:?} mm reads up to {most} voxels, and {MAX_WARP_READ} are allowed; ask for a \
             smaller patch, or less rotation_deg or zoom"
        ),
    )
}

/// Resolves a recipe; on a resolved one it changes nothing.
///
/// # Errors
/// [`StreamError`] names the field.
pub(super) fn resolve(
    cases: &dyn Cases,
    (bundle, seen): (Option<&Bundle>, &Seen),
    mut recipe: Recipe,
) -> Result<Prepared, StreamError> {
    recipe.validate()?;
    check_named(bundle, recipe.bundle.take())?;
    let plan = cases.plan();
    let organs = requested_organs(cases, &recipe)?;
    let allowed = allowed_cases(cases, &recipe)?;
    let kind = synthesizer(bundle, &recipe)?;
    recipe.synthesizer = Some(kind);
    recipe.patch = Some(recipe.patch(plan));
    // Limits of the patch hold for the plan's as well.
    recipe.validate()?;
    check_warp(&recipe, plan)?;
    let models = needed_models(bundle, &recipe);
    let models_mm = models.map_or(plan.spacing_mm, |bundle| bundle.plan.spacing_mm);
    let cubes = models.map_or_else(CubeSides::default, |bundle| bundle.cubes);
    let finest_mm = models_mm.into_iter().fold(f64::INFINITY, f64::min);
    let box_voxels = SizeClass::ALL.map(|size| {
        let bridge = GridBridge::new(plan.spacing_mm, models_mm, cubes.of(size));
        bridge.map_or([cubes.of(size); 3], |bridge| bridge.host_size())
    });
    let (donors, organs) = donors(cases, &recipe, &allowed, (box_voxels, organs))?;
    let mix = Mix {
        seed: recipe.seed,
        pools: pool_shares(cases, &recipe, &allowed),
        organs,
        sizes: recipe.sizes.iter().map(|(size, share)| (*size, *share)).collect(),
        contrasts: recipe.contrasts.iter().map(|(bin, share)| (*bin, *share)).collect(),
        centres: recipe.centres.iter().map(|(centre, share)| (*centre, *share)).collect(),
        patches_per_visit: recipe.patches_per_visit as usize,
        spacing_mm: std::array::from_fn(|axis| plan.spacing_mm[axis].max(models_mm[axis])),
        cube_mm: SizeClass::ALL.map(|size| cubes.of(size) as f64 * finest_mm),
    };
    let Some(schedule) = Schedule::new(&mix, cases.records(), &allowed) else {
        return infeasible("pools", "no case of the store can serve any of the pools and organs");
    };
    check_round(schedule.longest_round(), recipe.patches_per_visit)?;
    let feasible = feasible(&recipe, &mix, &schedule)?;
    fill_shares(&mut recipe, &mix, &feasible);
    let hosting = feasible.keys().any(|pool| *pool != Pool::LabelledReal);
    recipe.unlabelled_negatives = Some(negatives(bundle, &recipe));
    let bundle_hash = check_bundle(cases, (bundle, seen), &recipe, hosting, &allowed)?;
    let real_cases = real_cases(cases, &recipe, &mix, &allowed, hosting)?;
    let patches_per_epoch = recipe.patches_per_epoch.unwrap_or_else(|| {
        // Each volume of the hosts' pool, as often as it is visited.
        schedule.pool_size() * u64::from(recipe.patches_per_visit)
    });
    recipe.patches_per_epoch = Some(patches_per_epoch);
    let resolved = Resolved {
        hash: recipe.hash(),
        snapshot: cases.snapshot(),
        bundle: bundle_hash,
        models: (bundle.filter(|_| bundle_hash != Digest::default())).map(|bundle| bundle.provenance.clone()),
        revision: REVISION,
        patches_per_epoch,
        patch: recipe.patch(plan),
        labels: plan.labels.clone(),
        feasible,
        shortfall: schedule.shortfall().to_vec(),
        numerics: (bundle.filter(|bundle| bundle.hash == bundle_hash))
            .map_or_else(|| kernel::numerics().into(), Bundle::numerics),
        recipe,
    };
    Ok(Prepared {
        resolved: Arc::new(resolved),
        mix,
        schedule,
        models_mm,
        cubes,
        box_voxels,
        donors,
        real_cases,
    })
}

/// Refuses a recipe that names other models than these.
fn check_named(bundle: Option<&Bundle>, named: Option<String>) -> Result<(), StreamError> {
    match named {
        Some(named) if bundle.is_none_or(|bundle| bundle.hash.to_string() != named) => {
            let named: String = named.chars().take(80).collect();
            infeasible("bundle", format!("no models {named:?} are held"))
        }
        _ => Ok(()),
    }
}

/// Organs, each with its share.
type Shares = Vec<(Organ, f64)>;

/// Returns the organs with a share, refusing those that the label map or the store does not know.
fn requested_organs(cases: &dyn Cases, recipe: &Recipe) -> Result<Shares, StreamError> {
    let known = cases.plan().labels.organs();
    let held = |organ: &Organ| cases.records().iter().any(|record| record.organ(organ.id).is_some());
    let Some(shares) = &recipe.organs else {
        return Ok(known.into_iter().filter(held).map(|organ| (organ, 1.0)).collect());
    };
    let mut out = Vec::new();
    for (name, share) in shares {
        let names: Vec<&str> = known.iter().map(|organ| organ.name.as_str()).collect();
        let Some(organ) = known.iter().find(|organ| organ.name == *name) else {
            let name: String = name.chars().take(80).collect();
            return infeasible("organs", format!("unknown organ {name:?}: the label map has {names:?}"));
        };
        if *share > 0.0 && !held(organ) {
            return infeasible("organs", format!("no case of the store holds {name:?}"));
        }
        out.push((organ.clone(), *share));
    }
    Ok(out)
}

/// Tells for every case whether it may appear, refusing names that the store does not hold.
fn allowed_cases(cases: &dyn Cases, recipe: &Recipe) -> Result<Vec<bool>, StreamError> {
    let find = |field: &'static str, id: &String| match cases.find(id) {
        Some(case) => Ok(case),
        None => infeasible(
            field,
            format!("no case {:?} in the store", id.chars().take(80).collect::<String>()),
        ),
    };
    let mut allowed = vec![recipe.select.cases.is_none(); cases.records().len()];
    for id in recipe.select.cases.iter().flatten() {
        allowed[find("select.cases", id)?] = true;
    }
    for id in &recipe.select.hold_out {
        find("select.hold_out", id)?;
    }
    for (allowed, held_out) in allowed.iter_mut().zip(leak::held_out_cases(cases, &recipe.select)) {
        *allowed &= !held_out;
    }
    Ok(allowed)
}

/// Returns the models, where synthesizer or gate need them.
fn needed_models<'a>(bundle: Option<&'a Bundle>, recipe: &Recipe) -> Option<&'a Bundle> {
    let needed = recipe.gate.enabled || recipe.synthesizer.is_some_and(SynthesizerKind::is_trained);
    bundle.filter(|_| needed)
}

fn synthesizer(bundle: Option<&Bundle>, recipe: &Recipe) -> Result<SynthesizerKind, StreamError> {
    let has_generator = bundle.is_some_and(|bundle| bundle.generator.is_some());
    let has_published = bundle.is_some_and(|bundle| bundle.published.is_some());
    match recipe.synthesizer {
        None if has_generator => Ok(SynthesizerKind::Conditional),
        None if has_published => Ok(SynthesizerKind::Published),
        None => Ok(SynthesizerKind::Analytic),
        Some(SynthesizerKind::Conditional) if !has_generator => infeasible(
            "synthesizer",
            "conditional needs a generator, and the models hold none; analytic needs no weights",
        ),
        Some(SynthesizerKind::Published) if !has_published => infeasible(
            "synthesizer",
            "published needs the paper's generator, and the models hold none; import or train one, or ask for conditional \
             or analytic",
        ),
        Some(kind) => Ok(kind),
    }
}

/// Returns the pools' shares: those of the recipe, or 1 for every pool that has a case.
fn pool_shares(cases: &dyn Cases, recipe: &Recipe, allowed: &[bool]) -> Vec<(Pool, f64)> {
    if let Some(pools) = &recipe.pools {
        return pools.iter().map(|(pool, share)| (*pool, *share)).collect();
    }
    let kinds = cases.records().iter().zip(allowed).filter(|(_, allowed)| **allowed);
    let kinds: Vec<CaseKind> = kinds.map(|(record, _)| record.kind).collect();
    let exists = |pool: Pool| match pool {
        Pool::UnlabelledHost => kinds.contains(&CaseKind::Unlabelled),
        Pool::LabelledReal | Pool::LabelledHost => kinds.contains(&CaseKind::Labelled),
    };
    Pool::ALL
        .into_iter()
        .filter(|pool| exists(*pool))
        .map(|pool| (pool, 1.0))
        .collect()
}

/// Lists the real tumours that copy-paste may take, and the organs that it can serve.
fn donors(
    cases: &dyn Cases,
    recipe: &Recipe,
    allowed: &[bool],
    (box_voxels, organs): ([Shape; 4], Shares),
) -> Result<(Donors, Shares), StreamError> {
    let is_host = |(pool, share): (&Pool, &f64)| *pool != Pool::LabelledReal && *share > 0.0;
    let has_hosts = recipe.pools.as_ref().is_none_or(|pools| pools.iter().any(is_host));
    if recipe.synthesizer != Some(SynthesizerKind::CopyPaste) || !has_hosts {
        return Ok((Donors::default(), organs));
    }
    let donors = Donors::of(cases.records(), allowed, box_voxels);
    if donors.is_empty() {
        return infeasible(
            "synthesizer",
            format!(
                "copy_paste needs real tumours that fit into its boxes, at most {:?} voxels, and no case that may appear has one",
                box_voxels[SizeClass::Large as usize]
            ),
        );
    }
    let served = donors.organs(organs, recipe.organs.is_some());
    served.map_or_else(
        |name| {
            infeasible(
                "organs",
                format!("copy_paste has no tumour of {name:?} to copy in the cases that may appear"),
            )
        },
        |organs| Ok((donors, organs)),
    )
}

type Feasible = BTreeMap<Pool, BTreeMap<String, u64>>;

/// Counts the cases of each pool and organ, refusing a pool or organ that the client named and nothing can serve.
fn feasible(recipe: &Recipe, mix: &Mix, schedule: &Schedule) -> Result<Feasible, StreamError> {
    let mut feasible = Feasible::new();
    for (pool, organ, count) in schedule.feasible() {
        feasible.entry(pool).or_default().insert(organ.into(), count);
    }
    for (pool, share) in recipe.pools.iter().flatten() {
        if *share > 0.0 && !feasible.contains_key(pool) {
            return infeasible(
                "pools",
                format!(
                    "no case of the store can serve {} for the organs and sizes asked",
                    pool.name()
                ),
            );
        }
    }
    for (organ, _) in mix.organs.iter().filter(|(_, share)| *share > 0.0) {
        let served = feasible.values().any(|organs| organs.contains_key(&organ.name));
        if recipe.organs.is_some() && !served {
            return infeasible(
                "organs",
                format!(
                    "no selected case can serve {:?} in the pools and sizes asked",
                    organ.name
                ),
            );
        }
    }
    Ok(feasible)
}

/// Writes the shares that apply into the recipe, so that spelled-out defaults hash like absent ones.
fn fill_shares(recipe: &mut Recipe, mix: &Mix, feasible: &Feasible) {
    let served = |name: &String| feasible.values().any(|organs| organs.contains_key(name));
    let organs = mix.organs.iter().map(|(organ, share)| (organ.name.clone(), *share));
    recipe.organs = Some(organs.filter(|(name, share)| *share > 0.0 && served(name)).collect());
    let pools = mix.pools.iter().copied();
    recipe.pools = Some(pools.filter(|(pool, _)| feasible.contains_key(pool)).collect());
    recipe.sizes.retain(|_, share| *share > 0.0);
    recipe.contrasts.retain(|_, share| *share > 0.0);
    recipe.centres.retain(|_, share| *share > 0.0);
}

/// Returns what hidden tumours mean: what the recipe says, or the critic where there is one and a host to look at.
fn negatives(bundle: Option<&Bundle>, recipe: &Recipe) -> UnlabelledNegatives {
    let default = match bundle {
        Some(_) if hosts_unlabelled(recipe) => UnlabelledNegatives::Critic,
        _ => UnlabelledNegatives::Trust,
    };
    recipe.unlabelled_negatives.unwrap_or(default)
}

/// Tells whether a recipe whose shares are filled in serves unlabelled hosts.
fn hosts_unlabelled(recipe: &Recipe) -> bool {
    let pools = recipe.pools.as_ref();
    pools.is_some_and(|pools| pools.contains_key(&Pool::UnlabelledHost))
}

/// Checks what the recipe needs of the models; returns their hash, or zeros where it needs none.
fn check_bundle(
    cases: &dyn Cases,
    (bundle, seen): (Option<&Bundle>, &Seen),
    recipe: &Recipe,
    hosting: bool,
    allowed: &[bool],
) -> Result<Digest, StreamError> {
    let trained = recipe.synthesizer.is_some_and(SynthesizerKind::is_trained);
    let looks = recipe.unlabelled_negatives == Some(UnlabelledNegatives::Critic) && hosts_unlabelled(recipe);
    if !looks && !(hosting && (trained || recipe.gate.enabled)) {
        return Ok(Digest::default());
    }
    let Some(bundle) = bundle else {
        if !recipe.gate.enabled {
            return infeasible(
                "unlabelled_negatives",
                "critic needs a critic, and no models are loaded; ask for trust or ignore",
            );
        }
        return infeasible(
            "gate.enabled",
            "the gate needs a critic, and no models are loaded; set it to false to stream unjudged lesions",
        );
    };
    if recipe.gate.enabled && recipe.gate.rule == GateRule::Calibrated {
        check_calibration(bundle, recipe)?;
    }
    let is_measured = bundle
        .realism
        .as_ref()
        .is_some_and(|realism| !realism.scores.is_empty());
    if recipe.gate.enabled && recipe.gate.realism > 0.0 && !is_measured {
        return infeasible(
            "gate.realism",
            "the models have no discriminator that was shown held-out real lesions; train stage 2 anew with cases held out \
             (synthesizer.split), or ask for 0",
        );
    }
    leak::check_leak(cases, (bundle, seen), recipe, allowed)?;
    Ok(bundle.hash)
}

/// Refuses rounds that would not fit into memory: each is dealt as a whole.
fn check_round(visits: usize, patches_per_visit: u32) -> Result<(), StreamError> {
    if visits <= MAX_ROUND_VISITS {
        return Ok(());
    }
    let cases = visits / patches_per_visit.max(1) as usize;
    let most = MAX_ROUND_VISITS / cases.max(1);
    infeasible(
        "patches_per_visit",
        format!("{cases} cases can be visited {most} times in a row at most, not {patches_per_visit}"),
    )
}

fn check_calibration(bundle: &Bundle, recipe: &Recipe) -> Result<(), StreamError> {
    for organ in recipe.organs.iter().flatten().map(|(organ, _)| organ) {
        for (size, contrast) in recipe
            .sizes
            .keys()
            .flat_map(|size| recipe.contrasts.keys().map(move |contrast| (*size, *contrast)))
        {
            if bundle.calibration.thresholds(organ, size, contrast).is_none() {
                let bin = format!("{organ}/{}/{}", size.name(), contrast.name());
                return infeasible(
                    "gate.rule",
                    format!("the models have no calibrated threshold for {bin}; ask for fixed or published"),
                );
            }
        }
    }
    Ok(())
}

fn real_cases(
    cases: &dyn Cases,
    recipe: &Recipe,
    mix: &Mix,
    allowed: &[bool],
    hosting: bool,
) -> Result<BTreeMap<u8, Vec<usize>>, StreamError> {
    let mut out = BTreeMap::new();
    if recipe.fallback != Fallback::Real || !hosting {
        return Ok(out);
    }
    for (organ, _) in mix.organs.iter().filter(|(_, share)| *share > 0.0) {
        let holds = |(i, record): &(usize, &crate::store::CaseRecord)| {
            allowed[*i] && record.kind == CaseKind::Labelled && record.organ(organ.id).is_some()
        };
        let records = cases.records().iter().enumerate();
        let found: Vec<usize> = records.filter(holds).map(|(i, _)| i).collect();
        if found.is_empty() {
            return infeasible("fallback", format!("real needs a labelled case with {:?}", organ.name));
        }
        out.insert(organ.id, found);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampler::Augmentation;

    #[test]
    fn a_warp_that_reads_too_much_is_refused_by_what_it_would_read() {
        let recipe = Recipe {
            patch: Some([192; 3]),
            augment: Augmentation {
                warp: 1.0,
                rotation_deg: 30.0,
                zoom: 1.4,
                elastic_mm: 0.0,
                ..Augmentation::default()
            },
            ..Recipe::default()
        };
        let of = |recipe: &Recipe, spacing_mm| {
            let plan = Plan {
                spacing_mm,
                ..Plan::default()
            };
            check_warp(recipe, &plan)
        };
        of(&recipe, [1.5; 3]).unwrap();
        let said = of(&recipe, [5.0, 0.8, 0.8]).unwrap_err().to_string();
        assert!(
            said.contains("augment.warp") && said.contains("and 100663296 are allowed"),
            "{said}"
        );
        let mut still = recipe;
        still.augment.warp = 0.0;
        of(&still, [5.0, 0.8, 0.8]).unwrap();
    }

    #[test]
    fn a_round_that_does_not_fit_is_refused() {
        assert!(check_round(4_100_000, 41).is_ok());
        let refused = check_round(25_600_000, 256).unwrap_err().to_string();
        assert!(refused.contains("patches_per_visit"), "{refused}");
        assert!(
            refused.contains("100000 cases can be visited 41 times in a row at most, not 256"),
            "{refused}"
        );
    }
}

//! How far networks that see a box around a lesion would decide as they do on the full 96^3 patch.
//!
//! `cargo bench --bench boxes -- [--lesions N]`. The published networks work on full patches, because their field of view is
//! about 96 voxels wide and their norms take statistics of all of them. Here the published network (random weights, read
//! as a discriminator) and the demo's critic (trained) score lesions in both ways: the mean probability of the class in
//! question over the lesion. Thresholds are set so that 30, 50 and 70 % pass on full patches; the same thresholds then
//! decide on boxes, and Cohen's kappa says how far both agree beyond chance.

#![expect(clippy::unwrap_used, reason = "a bench that cannot go on should panic")]
#![expect(clippy::print_stdout, reason = "the table is its product")]
#![expect(clippy::print_stderr, reason = "a run takes minutes")]

use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData, activation};
use freetumor::checkpoint::Bundle;
use freetumor::nn::{CubeSides, Network, PublishedConfig};
use freetumor::phantom::{PhantomSpec, Phase, Scanner, Tumours, write_store};
use freetumor::rng::{Purpose, Rng};
use freetumor::sampler::diameters_mm;
use freetumor::store::{Cases, Store};
use freetumor::stream::recipe::Recipe;
use freetumor::synth::{LESION_FROM, PlantRequest, Planted, plant};
use freetumor::volume::{HuWindow, Organ, Plan, Region, SizeClass};
use ndarray::Array3;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const FULL_SIDE: usize = 96;
/// Large lesions get a cube of 96 voxels, where nothing differs.
const SIZES: [SizeClass; 3] = [SizeClass::Tiny, SizeClass::Small, SizeClass::Medium];
/// Shares that pass on the full patch.
const ACCEPTANCE: [f64; 3] = [0.3, 0.5, 0.7];

/// Scores of one lesion: on the full patch and on its box.
type Scores = [f64; 2];

/// A host, where lesions are planted and scored.
struct Scene {
    cases: Store,
    plan: Plan,
    organ: Organ,
    /// Holds the store.
    _folder: tempfile::TempDir,
}

impl Scene {
    fn new(spacing_mm: [f64; 3]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let plan = Plan {
            spacing_mm,
            ..Plan::default()
        };
        let spec = PhantomSpec {
            seed: 1,
            index: 0,
            scanner: Scanner::C,
            phase: Phase::Portal,
            tumours: Tumours::None,
            spacing_mm,
        };
        write_store(folder.path(), &plan, &[spec], &|_| ()).unwrap();
        Self {
            cases: Store::open(folder.path()).unwrap(),
            organ: plan.labels.organ("liver").unwrap(),
            plan,
            _folder: folder,
        }
    }

    fn plant(&self, size: SizeClass, index: u64) -> Option<Planted> {
        let holds_mm = f64::from(self.cases.records()[0].organ(self.organ.id).unwrap().holds_mm);
        let spacing_mm = self.plan.spacing_mm;
        let cube = CubeSides::default().of(size);
        let request = PlantRequest {
            cases: &self.cases,
            case: 0,
            organ: &self.organ,
            size,
            diameters_mm: diameters_mm(size, holds_mm, spacing_mm, cube as f64 * spacing_mm[0])?,
            form: &Recipe::default().lesion,
            box_voxels: [cube; 3],
            key: [1, index, 0],
        };
        plant(&request).unwrap()
    }

    /// Scores a lesion on the full patch around it and on its box; `chance` returns the probability of every voxel.
    fn score(&self, planted: &Planted, contrast_hu: f64, chance: &dyn Fn(&Array3<i16>) -> Array3<f32>) -> Scores {
        let side = planted.soft.dim().0;
        let from = FULL_SIDE / 2 - side / 2;
        let inner = ndarray::s![from..from + side, from..from + side, from..from + side];
        let full = self
            .cases
            .read(0, Region::centred(planted.centre, [FULL_SIDE; 3]))
            .unwrap();
        let mut patch = full.image;
        let mut window = patch.slice_mut(inner);
        assert_eq!(window, planted.host.image, "the box lies in the middle of the patch");
        window.zip_mut_with(&planted.soft, |hu, soft| {
            *hu += (contrast_hu * f64::from(*soft) / 255.0).round() as i16;
        });
        let cube = window.to_owned();
        let mean = |chance: ndarray::ArrayView3<f32>| {
            let inside = chance
                .iter()
                .zip(&planted.soft)
                .filter(|(_, soft)| **soft >= LESION_FROM);
            let (sum, count) = inside.fold((0.0, 0.0), |(sum, n), (p, _)| (sum + f64::from(*p), n + 1.0));
            sum / count
        };
        [mean(chance(&patch).slice(inner)), mean(chance(&cube).view())]
    }
}

/// Returns the probability of one class of a network's output.
fn chance(logits: Tensor<5>, class: usize) -> Array3<f32> {
    let [b, _, d, h, w] = logits.dims();
    let chances = activation::softmax(logits, 1).slice([0..b, class..class + 1, 0..d, 0..h, 0..w]);
    Array3::from_shape_vec((d, h, w), chances.into_data().try_to_vec().unwrap()).unwrap()
}

fn input(image: &Array3<i16>, window: HuWindow) -> Tensor<5> {
    let (d, h, w) = image.dim();
    let values: Vec<f32> = image.iter().map(|hu| window.normalise(*hu)).collect();
    Tensor::from_data(TensorData::new(values, [1, 1, d, h, w]), &Device::flex())
}

/// Cohen's kappa of two raters' decisions (Cohen, Educational and Psychological Measurement 20, 1960); none where both
/// always say the same.
fn kappa(decisions: &[[bool; 2]]) -> Option<f64> {
    let count = decisions.len() as f64;
    let share = |says: &dyn Fn(&[bool; 2]) -> bool| decisions.iter().filter(|d| says(d)).count() as f64 / count;
    let (first, second) = (share(&|d| d[0]), share(&|d| d[1]));
    let agree = share(&|d| d[0] == d[1]);
    let chance = first * second + (1.0 - first) * (1.0 - second);
    (chance < 1.0).then(|| (agree - chance) / (1.0 - chance))
}

fn report(name: &str, size: SizeClass, scores: &[Scores]) {
    let mut sorted: Vec<f64> = scores.iter().map(|score| score[0]).collect();
    sorted.sort_by(f64::total_cmp);
    let mut line = format!(
        "| {name} | {} | {} | {} |",
        size.name(),
        CubeSides::default().of(size),
        scores.len()
    );
    for accepted in ACCEPTANCE {
        let threshold = sorted[((1.0 - accepted) * scores.len() as f64).round() as usize];
        let decisions: Vec<[bool; 2]> = scores.iter().map(|score| score.map(|s| s >= threshold)).collect();
        let passed = decisions.iter().filter(|decision| decision[1]).count() as f64 / scores.len() as f64;
        let kappa = kappa(&decisions).map_or("-".into(), |kappa| format!("{kappa:.2}"));
        line += &format!(" {kappa} ({passed:.2}) |");
    }
    println!("{line}");
}

fn score_all(name: &str, scene: &Scene, lesions: usize, chance: &dyn Fn(&Array3<i16>) -> Array3<f32>) {
    for size in SIZES {
        let mut scores = Vec::new();
        for index in 0.. {
            if scores.len() == lesions {
                break;
            }
            assert!(
                index < 20 * lesions as u64,
                "the phantom's liver has no place for {}",
                size.name()
            );
            let Some(planted) = scene.plant(size, index) else {
                continue;
            };
            let mut rng = Rng::keyed(1, index, 0, Purpose::Contrast);
            scores.push(scene.score(&planted, rng.range(-80.0, -20.0), chance));
            eprintln!("{name} {}: {} of {lesions}", size.name(), scores.len());
        }
        report(name, size, &scores);
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let at = arguments.iter().position(|argument| argument == "--lesions");
    let lesions = at.map_or(40, |at| arguments[at + 1].parse().unwrap());
    println!(
        "| network | lesions | box | number | kappa at 0.3 (passes in boxes) | at 0.5 | at 0.7 |\n|---|---|---|---|---|---|---|"
    );

    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo");
    let bundle = Bundle::load_critic(&models, &Device::flex()).unwrap();
    let scene = Scene::new(bundle.plan.spacing_mm);
    let (critic, window): (&Network, _) = (&bundle.critic, bundle.plan.window_hu);
    let tumour = usize::from(scene.organ.tumour_id);
    score_all("demo critic", &scene, lesions, &|image| {
        chance(critic.forward(input(image, window)), tumour)
    });

    let published = PublishedConfig::discriminator(PublishedConfig::PUBLISHED_WIDTH);
    let net = published.init(&Device::flex(), 1);
    let scene = Scene::new([1.5; 3]);
    let window = scene.plan.window_hu;
    score_all("published, random weights", &scene, lesions, &|image| {
        chance(net.forward(input(image, window)), 1)
    });
}

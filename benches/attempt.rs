//! What one attempted lesion costs per size class, relative to the same networks on the full 96^3 patch.
//!
//! `cargo bench --bench attempt -- [--json] [--rounds N] [--sizes NAME,..] [--widths A,B,..]`. An attempt prepares
//! (draws, places, reads the host, makes the soft mask), generates, composes, shows both cubes to the critic, and scores.
//! The full patch is what a synthesizer without cubes would run: the generator once and the critic twice.

#![expect(clippy::unwrap_used, reason = "a bench that cannot go on should panic")]
#![expect(clippy::print_stdout, reason = "the table is its product")]
#![expect(clippy::print_stderr, reason = "a run takes minutes")]

use std::sync::Arc;
use std::time::Instant;

use burn::module::Module;
use burn::tensor::Device;
use freetumor::checkpoint::{Bundle, Calibration, Provenance};
use freetumor::digest::Digest;
use freetumor::nn::{ContrastOver, CubeSides, GeneratorConfig, UnetConfig};
use freetumor::phantom::{PhantomSpec, Phase, Scanner, Tumours, write_store};
use freetumor::rng::{Purpose, Rng};
use freetumor::sampler::{diameters_mm, draw_contrast_hu};
use freetumor::store::{Cases, Store};
use freetumor::stream::recipe::Recipe;
use freetumor::synth::gate::{self, Judged};
use freetumor::synth::{Cancelled, Engine, LESION_FROM, LesionCube, PlantRequest, Planted, compose, plant};
use freetumor::volume::{ContrastBin, Organ, Plan, Region, SizeClass};
use ndarray::Array3;

/// The allocator of the binary; `MIMALLOC_PURGE_DELAY=-1` makes it keep what is freed, as there.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const SPACING_MM: [f64; 3] = [1.5; 3];
/// The published patch.
const FULL_SIDE: usize = 96;
/// Keys tried for a lesion that finds a place.
const KEYS: u64 = 64;
/// The steps of an attempt, as the table names them.
const STEPS: [&str; 5] = ["prepare", "generate", "compose", "judge", "score"];

/// What the command line asks for.
struct Wanted {
    json: bool,
    rounds: usize,
    sizes: Vec<SizeClass>,
    widths: Vec<usize>,
}

impl Wanted {
    fn parse() -> Self {
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        let value = |flag: &str| {
            let at = arguments.iter().position(|argument| argument == flag)?;
            arguments.get(at + 1)
        };
        let size = |name: &str| SizeClass::ALL.into_iter().find(|size| size.name() == name).unwrap();
        // The widths of the released generator, the nearest our network comes to it.
        let widths = value("--widths").map_or("64,128,256,512", String::as_str);
        Self {
            json: arguments.iter().any(|argument| argument == "--json"),
            rounds: value("--rounds").map_or(3, |rounds| rounds.parse().unwrap()),
            sizes: value("--sizes").map_or(SizeClass::ALL.to_vec(), |names| names.split(',').map(size).collect()),
            widths: widths.split(',').map(|width| width.parse().unwrap()).collect(),
        }
    }
}

/// Makes networks with random weights: what they cost does not depend on what they learned.
fn bundle(plan: &Plan, widths: &[usize]) -> Bundle {
    let device = Device::flex();
    let organs = plan.labels.organs().len();
    let critic = UnetConfig {
        in_channels: 1,
        // Background, and per organ itself and its tumour.
        out_channels: 1 + 2 * organs,
        widths: widths.to_vec(),
        condition: 0,
    };
    let generator = GeneratorConfig {
        widths: widths.to_vec(),
        organs,
        spread_hu: 30.0,
        contrast_over: ContrastOver::Lesion,
    };
    Bundle {
        hash: Digest::default(),
        plan: plan.clone(),
        cubes: CubeSides::default(),
        critic: critic.init(&device, 1).into(),
        critic_seen: Provenance::default(),
        inner: Vec::new(),
        generator: Some(generator.init(&device, 2)),
        published: None,
        discriminator: None,
        calibration: Calibration::default(),
        realism: None,
        provenance: Provenance::default().into(),
    }
}

/// A host on disk, and the networks at work.
struct Scene {
    cases: Store,
    plan: Plan,
    organ: Organ,
    engine: Engine,
    /// Of generator and critic.
    parameters: [usize; 2],
    /// Holds the store.
    _folder: tempfile::TempDir,
}

impl Scene {
    fn new(widths: &[usize]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let plan = Plan::default();
        let spec = PhantomSpec {
            seed: 1,
            index: 0,
            scanner: Scanner::C,
            phase: Phase::Portal,
            tumours: Tumours::None,
            spacing_mm: SPACING_MM,
        };
        write_store(folder.path(), &plan, &[spec], &|_| ()).unwrap();
        let bundle = bundle(&plan, widths);
        Self {
            cases: Store::open(folder.path()).unwrap(),
            organ: plan.labels.organ("liver").unwrap(),
            plan,
            parameters: [
                bundle.generator.as_ref().unwrap().num_params(),
                bundle.critic.num_params(),
            ],
            engine: Engine::start(Arc::new(bundle), 1, 1).unwrap(),
            _folder: folder,
        }
    }

    fn plant(&self, size: SizeClass, index: u64) -> Option<Planted> {
        let holds_mm = self.cases.records()[0].organ(self.organ.id).unwrap().holds_mm;
        let cube = CubeSides::default().of(size);
        let cube_mm = cube as f64 * SPACING_MM[0];
        let request = PlantRequest {
            cases: &self.cases,
            case: 0,
            organ: &self.organ,
            size,
            diameters_mm: diameters_mm(size, f64::from(holds_mm), SPACING_MM, cube_mm)?,
            form: &Recipe::default().lesion,
            box_voxels: [cube; 3],
            key: [1, index, 0],
        };
        plant(&request).unwrap()
    }

    fn cube(&self, planted: &Planted, index: u64) -> LesionCube {
        let mut rng = Rng::keyed(1, index, 0, Purpose::Contrast);
        LesionCube {
            image: planted.host.image.clone(),
            soft: planted.soft.clone(),
            organ: 0,
            host: planted.host.labels.map(|label| u8::from(*label == self.organ.id)),
            diameter_mm: planted.diameter_mm,
            contrast_hu: draw_contrast_hu(&mut rng, ContrastBin::Dark),
            spacing_mm: SPACING_MM,
            key: [1, index, 0],
            cancelled: Cancelled::default(),
        }
    }

    /// Carries one attempt out; returns the seconds of its steps.
    fn attempt(&self, size: SizeClass, index: u64) -> Option<[f64; 5]> {
        let mut clock = Clock::new();
        let planted = self.plant(size, index)?;
        let cube = self.cube(&planted, index);
        clock.lap();
        let residual = self.engine.paint(&cube).unwrap();
        clock.lap();
        let after = compose(&cube.image, &residual, &cube.soft);
        clock.lap();
        let (before, cancelled) = (planted.host.image.clone(), Cancelled::default());
        let called = self.engine.judge(after, None, &cancelled).unwrap();
        let seen = self.engine.judge(before, None, &cancelled).unwrap();
        clock.lap();
        let lesion = planted.soft.map(|soft| u8::from(*soft >= LESION_FROM));
        let tumours: Vec<u8> = self.plan.labels.organs().iter().map(|organ| organ.tumour_id).collect();
        let scores = gate::scores(&Judged {
            before: &seen,
            after: &called,
            lesion: &lesion,
            others: &planted.host.labels.map(|label| u8::from(tumours.contains(label))),
            tumour_id: self.organ.tumour_id,
            spacing_mm: SPACING_MM,
            radius_mm: planted.diameter_mm / 2.0,
        });
        std::hint::black_box(scores);
        clock.lap();
        clock.laps.try_into().ok()
    }

    /// Runs the generator once and the critic twice on the full patch; returns the seconds of both.
    fn full(&self) -> [f64; 2] {
        let centre = self.cases.candidates(0, self.organ.id).unwrap()[0].voxel.map(i64::from);
        let region = Region::centred(centre, [FULL_SIDE; 3]);
        let host = self.cases.read(0, region).unwrap();
        let soft = Array3::from_elem([FULL_SIDE; 3], 255);
        let planted = Planted {
            host,
            centre,
            soft,
            diameter_mm: 20.0,
            radii_mm: [10.0; 3],
        };
        let cube = self.cube(&planted, 0);
        let mut clock = Clock::new();
        let residual = self.engine.paint(&cube).unwrap();
        clock.lap();
        let after = compose(&cube.image, &residual, &cube.soft);
        clock.last = Instant::now();
        self.engine.judge(after, None, &cube.cancelled).unwrap();
        self.engine.judge(cube.image, None, &cube.cancelled).unwrap();
        clock.lap();
        [clock.laps[0], clock.laps[1]]
    }
}

/// Seconds between calls.
struct Clock {
    last: Instant,
    laps: Vec<f64>,
}

impl Clock {
    fn new() -> Self {
        Self {
            last: Instant::now(),
            laps: Vec::new(),
        }
    }

    fn lap(&mut self) {
        self.laps.push(self.last.elapsed().as_secs_f64());
        self.last = Instant::now();
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let upper = values.len() / 2;
    (values[upper] + values[(values.len() - 1) / 2]) / 2.0
}

/// Medians of a size class.
struct Row {
    size: SizeClass,
    steps: [f64; 5],
    seconds: f64,
    ratio: f64,
}

fn main() {
    let wanted = Wanted::parse();
    let scene = Scene::new(&wanted.widths);
    let (full_seconds, rows) = measure(&wanted, &scene);
    if wanted.json {
        print_json(&wanted, &scene, full_seconds, &rows);
    } else {
        print_table(&wanted, &scene, full_seconds, &rows);
    }
}

/// Returns the median of the full patch in seconds, and those of the size classes.
///
/// Attempts and full patches take turns, so that both see the same machine. A first turn of attempts only warms up;
/// a full patch of many seconds needs none.
fn measure(wanted: &Wanted, scene: &Scene) -> (f64, Vec<Row>) {
    // Places are chosen before the clock runs: an attempt that finds none costs next to nothing, and is no patch.
    let placed = |size: SizeClass| (0..KEYS).filter(|index| scene.plant(size, *index).is_some()).collect();
    let keys: Vec<Vec<u64>> = wanted.sizes.iter().map(|size| placed(*size)).collect();
    let mut full = Vec::new();
    let mut laps: Vec<Vec<[f64; 5]>> = vec![Vec::new(); keys.len()];
    for round in 0..=wanted.rounds {
        if round > 0 {
            full.push(scene.full().iter().sum());
        }
        for ((size, keys), laps) in wanted.sizes.iter().zip(&keys).zip(&mut laps) {
            laps.push(scene.attempt(*size, keys[round % keys.len()]).unwrap());
        }
        eprintln!("round {round} of {}; full patches in s: {full:.2?}", wanted.rounds);
    }
    let full_seconds = median(full);
    let rows = (wanted.sizes.iter().zip(&laps)).map(|(size, laps)| Row::of(*size, &laps[1..], full_seconds));
    (full_seconds, rows.collect())
}

impl Row {
    fn of(size: SizeClass, laps: &[[f64; 5]], full_seconds: f64) -> Self {
        let seconds = median(laps.iter().map(|steps| steps.iter().sum()).collect());
        Self {
            size,
            steps: std::array::from_fn(|step| median(laps.iter().map(|steps| steps[step]).collect())),
            seconds,
            ratio: seconds / full_seconds,
        }
    }
}

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn print_json(wanted: &Wanted, scene: &Scene, full_seconds: f64, rows: &[Row]) {
    let class = |row: &Row| {
        let steps = STEPS.iter().zip(row.steps);
        let steps: serde_json::Map<_, _> = steps.map(|(name, s)| (format!("{name}_s"), s.into())).collect();
        let value = serde_json::json!({ "attempt_s": row.seconds, "ratio": row.ratio, "steps": steps });
        (row.size.name().to_owned(), value)
    };
    let classes: serde_json::Map<_, _> = rows.iter().map(class).collect();
    let out = serde_json::json!({
        "widths": wanted.widths, "parameters": scene.parameters, "rounds": wanted.rounds, "threads": threads(),
        "full_s": full_seconds, "classes": classes,
    });
    println!("{out}");
}

fn print_table(wanted: &Wanted, scene: &Scene, full_seconds: f64, rows: &[Row]) {
    let [generator, critic] = scene.parameters.map(|n| n as f64 / 1e6);
    let (widths, rounds) = (&wanted.widths, wanted.rounds);
    println!("widths {widths:?}: generator {generator:.2} M parameters, critic {critic:.2} M");
    println!(
        "{} threads; full 96^3 patch: {full_seconds:.2} s, median of {rounds}",
        threads()
    );
    println!(
        "| class | cube | {} (ms) | attempt (s) | of the full patch |",
        STEPS.join(" | ")
    );
    println!("|---|---|{}---|---|", "---|".repeat(STEPS.len()));
    for row in rows {
        let steps = row.steps.map(|seconds| format!("{:.1}", seconds * 1e3)).join(" | ");
        let (name, side) = (row.size.name(), CubeSides::default().of(row.size));
        println!("| {name} | {side} | {steps} | {:.3} | {:.3} |", row.seconds, row.ratio);
    }
}

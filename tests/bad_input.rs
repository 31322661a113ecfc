//! Bad input: every row ends in a clear error that names the file, key or field; nothing panics, nothing hangs.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod support;

use std::fs;
use std::path::Path;

use support::{Nifti, Server, run};

/// A 16^3 CT of soft tissue with one corner of air.
fn image() -> Vec<u8> {
    let voxels: Vec<u8> = (0..16 * 16 * 16)
        .flat_map(|i: i32| (if i < 64 { -1000i16 } else { 40 + (i % 7) as i16 }).to_le_bytes())
        .collect();
    Nifti {
        dim: &[3, 16, 16, 16],
        spacing: [3.0; 3],
        datatype: 4,
        data: &voxels,
    }
    .bytes()
}

fn labels(side: i16, id: u8) -> Vec<u8> {
    let voxels = vec![id; (side as usize).pow(3)];
    Nifti {
        dim: &[3, side, side, side],
        spacing: [3.0; 3],
        datatype: 2,
        data: &voxels,
    }
    .bytes()
}

/// One refused command: its name, the files it needs, its arguments (`@` stands for the folder), and what it must say.
struct Row {
    name: &'static str,
    files: Vec<(&'static str, Vec<u8>)>,
    arguments: String,
    says: &'static [&'static str],
}

/// Returns a volume of 16^3 voxels, as its fields say and not as its bytes are.
fn volume(dim: &[i16], spacing_mm: f32, datatype: i16) -> Vec<u8> {
    let data = vec![0; 4096 * 4];
    Nifti {
        dim,
        spacing: [spacing_mm; 3],
        datatype,
        data: &data,
    }
    .bytes()
}

/// Damaged images: each is ingested as `a.nii`.
fn image_rows() -> Vec<Row> {
    let cube = [3, 16, 16, 16];
    let mut nan = volume(&cube, 1.0, 16);
    nan[352 + 36..352 + 40].copy_from_slice(&f32::NAN.to_le_bytes());
    let mut short = image();
    short.truncate(2000);
    let images: Vec<(&'static str, Vec<u8>, &'static [&'static str])> = vec![
        (
            "not a NIfTI",
            b"hello, this is no image at all".to_vec(),
            &["NIfTI", "348"],
        ),
        ("empty file", Vec::new(), &["shorter than a header"]),
        ("truncated voxels", short, &["expected 8192 bytes", "1648"]),
        ("2-D image", volume(&[2, 16, 16], 1.0, 2), &["expected a volume", "2-D"]),
        ("NaN voxel", nan, &["1 voxels are NaN or infinite"]),
        (
            "more voxels than any scanner",
            volume(&[3, 32767, 32767, 32767], 1.0, 4),
            &["2048", "32767"],
        ),
        ("negative size", volume(&[3, -5, 16, 16], 1.0, 4), &["dim", "-5"]),
        ("no spacing", volume(&cube, 0.0, 2), &["0.01..=100.0 mm"]),
        (
            "spacing that is no number",
            volume(&cube, f32::NAN, 2),
            &["affine", "finite", "NaN"],
        ),
        ("colours", volume(&cube, 1.0, 128), &["datatype", "integer or float"]),
    ];
    let row = |(name, bytes, says)| Row {
        name,
        files: vec![("a.nii", bytes)],
        arguments: format!("{INGEST} --image @/a.nii"),
        says,
    };
    images.into_iter().map(row).collect()
}

const INGEST: &str = "ingest --config configs/demo.toml --preset lits --store @/s";

fn ingest_rows() -> Vec<Row> {
    let row = |name, files, arguments: &str, says| Row {
        name,
        files,
        arguments: format!("{INGEST} {arguments}"),
        says,
    };
    let pair = |labels: Vec<u8>| vec![("a.nii", image()), ("b.nii", labels)];
    let list = |text: &str| vec![("list.json", text.as_bytes().to_vec())];
    let with_labels = "--image @/a.nii --labels @/b.nii";
    let listed = "--datalist @/list.json";
    let cut_gzip = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\x4b".to_vec();
    vec![
        row("missing image", vec![], "--image @/a.nii", &["a.nii", "No such file"]),
        row(
            "cut gzip",
            vec![("a.nii.gz", cut_gzip)],
            "--image @/a.nii.gz",
            &["a.nii.gz", "shorter than a header"],
        ),
        row(
            "labels on another grid",
            pair(labels(12, 1)),
            with_labels,
            &["b.nii", "not on the grid", "16", "12"],
        ),
        row(
            "unknown label id",
            pair(labels(16, 9)),
            with_labels,
            &["b.nii", "label id 9", "0, 1, 2"],
        ),
        row(
            "missing labels",
            vec![("a.nii", image())],
            with_labels,
            &["b.nii", "No such file"],
        ),
        row("missing datalist", vec![], listed, &["list.json", "No such file"]),
        row("datalist that is no JSON", list("{"), listed, &["list.json", "line 1"]),
        row(
            "datalist of nothing",
            list(r#"{"training": []}"#),
            listed,
            &["list.json", "no entries under training"],
        ),
        row(
            "datalist of a missing case",
            list(r#"{"training": ["gone.nii"]}"#),
            listed,
            &["gone.nii", "No such file"],
        ),
        row(
            "datalist entry without an image",
            list(r#"{"training": [{"label": "l.nii"}]}"#),
            listed,
            &["list.json", "an object with `image`"],
        ),
        row(
            "two cases of one name",
            list(r#"{"training": [{"image": "a.nii", "id": "x"}, {"image": "b.nii", "id": "x"}]}"#),
            listed,
            &["list.json", "a.nii", "b.nii", "\"x\""],
        ),
        row(
            "a shard that is none",
            list("{}"),
            "--datalist @/list.json --shard 5/2",
            &["--shard", "i below n", "5/2"],
        ),
        row("no image and no datalist", vec![], "", &["--datalist"]),
    ]
}

/// Other commands.
fn command_rows() -> Vec<Row> {
    let rows: [(&'static str, &str, &'static [&'static str]); 9] = [
        (
            "unknown preset",
            "ingest --config configs/demo.toml --preset lit --store @/s --image @/a.nii",
            &["preset lit", "lits"],
        ),
        (
            "missing configuration",
            "check-config --config @/c.toml",
            &["c.toml", "No such file"],
        ),
        (
            "no store there",
            "serve --store @/none --bind 127.0.0.1:0",
            &["none/index.bin", "there is no store"],
        ),
        (
            "no store to train on",
            "train critic --store @/none --out @/o",
            &["none/index.bin", "there is no store"],
        ),
        (
            "address that is none",
            "serve --store @/none --bind nowhere",
            &["--bind", "nowhere"],
        ),
        (
            "device that is none",
            "serve --store @/none --device tpu",
            &["--device", "cuda:N", "tpu"],
        ),
        (
            "a server that is not there",
            "healthcheck --url http://127.0.0.1:1",
            &["127.0.0.1:1", "not ready"],
        ),
        (
            "fewer than no phantoms",
            "phantom --store @/s --labelled=-1",
            &["--labelled", "-1"],
        ),
        ("a command that is none", "stream", &["stream", "--help"]),
    ];
    let row = |(name, arguments, says): (_, &str, _)| Row {
        name,
        files: Vec::new(),
        arguments: arguments.into(),
        says,
    };
    rows.into_iter().map(row).collect()
}

/// Configurations: the text, and what the refusal must say beside the file's name.
const CONFIGURATIONS: [(&str, &[&str]); 27] = [
    ("[plan", &["line 1"]),
    ("[plan]\nspacing = [1,1,1]\n", &["plan.spacing", "spacing_mm"]),
    (
        "[plan]\nspacing_mm = [0.0,1.0,1.0]\n",
        &["plan.spacing_mm", "0.1 to 20", "0.0"],
    ),
    ("[plan]\nspacing_mm = [nan,1.0,1.0]\n", &["plan.spacing_mm", "NaN"]),
    ("[plan]\npatch = [0,64,64]\n", &["plan.patch", "16 to 384"]),
    (
        "[plan.window_hu]\nlow = 5.0\nhigh = -5.0\n",
        &["plan.window_hu", "low < high", "5 and -5"],
    ),
    (
        "[plan.labels]\nbackground = 0\nliver = 4\n",
        &["plan.labels", "liver", "consecutive"],
    ),
    ("[server]\nbind = \"x\"\n", &["server.bind"]),
    ("[server]\nmax_streams = 0\n", &["server.max_streams", "1 to 4096"]),
    ("[server]\nread_keys = \"\"\n", &["server.read_keys", "empty"]),
    (
        "[server]\nadmin_keys = [\"a\", \"b\", \"c\"]\n",
        &["server.admin_keys", "at most two", "3"],
    ),
    ("[server]\ntls_key = \"k.pem\"\n", &["server.tls_certificate"]),
    ("[stream]\nwindow = 0\n", &["stream.window", "1 to 1024"]),
    (
        "[stream]\npreparation_threads = 1000000\n",
        &["stream.preparation_threads", "1000000"],
    ),
    ("[log]\nlevel = \"loud\"\n", &["log.level", "info", "loud"]),
    ("[recipe.gate]\nrecall = 2.0\n", &["gate.recall", "0 to 1"]),
    ("[recipe.organs]\nspleen = 1.0\n", &["recipe.organs", "spleen", "liver"]),
    ("[recipe]\npatches_per_epoch = 0\n", &["patches_per_epoch", "1 to"]),
    ("[critic]\nsteps = -1\n", &["critic.steps", "-1"]),
    ("[critic]\nwidths = []\n", &["critic.widths", "1 to 5 numbers"]),
    ("[critic.cube_mix]\ntiny = nan\n", &["critic.cube_mix", "at least 0"]),
    ("[critic.split]\nfold = 7\n", &["critic.split.fold", "less than"]),
    (
        "[critic.optimizer]\nlearning_rate = -1.0\n",
        &["critic.optimizer.learning_rate", "above 0"],
    ),
    ("[critic]\nprecision = \"quarter\"\n", &["critic.precision", "half"]),
    (
        "[synthesizer]\nmax_cube = 100\n",
        &["synthesizer.max_cube", "multiple of 16"],
    ),
    (
        "[synthesizer]\nheld_out_lesions = 1000000\n",
        &["synthesizer.held_out_lesions", "1 to 606 with cubes of up to 96 voxels"],
    ),
    ("[segmentor]\nbatch_size = 0\n", &["segmentor.batch_size", "at least 1"]),
];

/// Runs every row, so that one run tells of all that are wrong.
fn check(rows: impl IntoIterator<Item = Row>) {
    let mut wrong = Vec::new();
    for Row {
        name,
        files,
        arguments,
        says,
    } in rows
    {
        let folder = tempfile::tempdir().unwrap();
        for (file, bytes) in files {
            fs::write(folder.path().join(file), bytes).unwrap();
        }
        let arguments = arguments.replace('@', folder.path().to_str().unwrap());
        let said = run(&arguments.split_whitespace().collect::<Vec<_>>());
        let is_refused = matches!(said.code, Some(1 | 2)) && !said.text.contains("panicked");
        if !is_refused || says.iter().any(|part| !said.text.contains(part)) {
            wrong.push(format!(
                "{name}: wanted {says:?}, got exit {:?}: {}",
                said.code, said.text
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn bad_files_are_refused_by_name() {
    check(image_rows().into_iter().chain(ingest_rows()));
}

#[test]
fn bad_configuration_is_refused_by_key() {
    check(CONFIGURATIONS.into_iter().map(|(text, says)| Row {
        name: text,
        files: vec![("c.toml", text.as_bytes().to_vec())],
        arguments: "check-config --config @/c.toml".into(),
        says,
    }));
}

#[test]
fn bad_arguments_are_refused_by_name() {
    check(command_rows());
}

#[test]
fn a_damaged_index_a_taken_port_and_foreign_models_stop_serve() {
    let copy = support::store_copy();
    let index = copy.path().join("index.bin");
    let mut bytes = fs::read(&index).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&index, bytes).unwrap();
    let serve = |store: &Path, extra: &[&str]| {
        let mut arguments = vec![
            "serve",
            "--config",
            "configs/demo.toml",
            "--store",
            store.to_str().unwrap(),
        ];
        arguments.extend(extra);
        run(&arguments)
    };
    let said = serve(copy.path(), &["--bind", "127.0.0.1:0"]);
    assert!(said.code == Some(1) && said.text.contains("index.bin"), "{}", said.text);

    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let said = serve(support::phantom_store(), &["--bind", &address]);
    assert!(said.code == Some(1) && said.text.contains(&address), "{}", said.text);

    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(support::models()).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    let weights = folder.path().join("critic.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&weights, bytes).unwrap();
    let said = serve(
        support::phantom_store(),
        &["--models", folder.path().to_str().unwrap(), "--bind", "127.0.0.1:0"],
    );
    assert!(
        said.code == Some(1) && said.text.contains("critic.safetensors") && said.text.contains("sha256"),
        "{}",
        said.text
    );

    let said = serve(
        support::phantom_store(),
        &["--models", "/nonexistent-models", "--bind", "127.0.0.1:0"],
    );
    assert!(
        said.code == Some(1) && said.text.contains("nonexistent-models"),
        "{}",
        said.text
    );
}

#[test]
fn bad_requests_name_the_field() {
    let server = Server::start(support::phantom_store(), &[]);
    let stream = |body: &str| server.post("/v1/stream", body.as_bytes());
    let zeros = "0".repeat(64);
    let cursor = format!(
        r#"{{"delivery": {{"cursor": {{"recipe": "{zeros}", "snapshot": "{zeros}", "bundle": "{zeros}", "revision": 1, "next_index": 0}}}}}}"#
    );
    let rows: Vec<(&str, u16, &[&str])> = vec![
        ("{", 400, &["JSON"]),
        (r#"{"recipe": {"sed": 1}}"#, 422, &["sed"]),
        (r#"{"receipt": {}}"#, 422, &["receipt"]),
        (
            r#"{"recipe": {"gate": {"recall": 2.0}}}"#,
            422,
            &["gate.recall", "0 to 1"],
        ),
        (r#"{"recipe": {"sizes": {"tiny": -1}}}"#, 422, &["sizes"]),
        (r#"{"recipe": {"sizes": {"huge": 1}}}"#, 422, &["huge"]),
        (r#"{"recipe": {"patch": [4096, 64, 64]}}"#, 422, &["patch"]),
        (r#"{"recipe": {"organs": {"spleen": 1}}}"#, 422, &["organs", "spleen"]),
        (
            r#"{"recipe": {"select": {"hold_out": ["no-such-case"]}}}"#,
            422,
            &["hold_out", "no-such-case"],
        ),
        (r#"{"recipe": {"synthesizer": "magic"}}"#, 422, &["magic"]),
        (
            r#"{"recipe": {"synthesizer": "published"}}"#,
            422,
            &["synthesizer", "published"],
        ),
        (r#"{"recipe": {"lesion": {"edge_mm": 99}}}"#, 422, &["lesion.edge_mm"]),
        (r#"{"delivery": {"rank": 3, "world": 2}}"#, 422, &["rank"]),
        (r#"{"delivery": {"batch_size": 0}}"#, 422, &["batch_size"]),
        (
            r#"{"recipe": {"patch": [384, 384, 384]}, "delivery": {"batch_size": 64}}"#,
            422,
            &["batch_size", "frame limit", "64 patches"],
        ),
        (r#"{"delivery": {"codec": "lzma"}}"#, 422, &["lzma"]),
        (r#"{"delivery": {"cursor": {"recipe": "x"}}}"#, 422, &["cursor"]),
        (&cursor, 409, &["recipe"]),
    ];
    let mut wrong = Vec::new();
    for (body, status, says) in rows {
        let answer = stream(body);
        let is_problem = answer.status == status && answer.head.contains("application/problem+json");
        if !is_problem || says.iter().any(|part| !answer.text().contains(part)) {
            wrong.push(format!(
                "{body}: wanted {status} {says:?}, got {} {}",
                answer.status,
                answer.text()
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(server.post("/v1/stream", &vec![b' '; 2 << 20]).status, 413);
    assert_eq!(server.get("/v1/nothing").status, 404);
    assert_eq!(server.get("/v1/stream").status, 405);
    for (query, part) in [
        ("index=-1", "index"),
        ("index=0&format=pickle", "format"),
        ("index=0&gate=maybe", "gate"),
        ("index=0&colour=1", "colour"),
    ] {
        let answer = server.get(&format!("/v1/batch?{query}"));
        assert_eq!(answer.status, 422, "{query}: {}", answer.text());
        assert!(answer.text().contains(part), "{query}: {}", answer.text());
    }
    assert_eq!(server.get("/livez").status, 200, "the server is none the worse");
}

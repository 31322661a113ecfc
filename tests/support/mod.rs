//! Runs the real binary: commands, and a server on a free port that dies with the test.

#![allow(dead_code, reason = "every test file uses its own part")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

use std::io::{BufRead, BufReader, Read, Seek, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The binary under test.
pub fn freetumor() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_freetumor"));
    command.current_dir(env!("CARGO_MANIFEST_DIR")).stdin(Stdio::null());
    command
}

/// What a command said.
pub struct Said {
    /// Exit code, or nothing where a signal ended it.
    pub code: Option<i32>,
    /// Standard output and error.
    pub text: String,
}

/// The longest that any command of a test may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// Runs a command to its end; one that hangs is ended and fails the test.
pub fn run(arguments: &[&str]) -> Said {
    let log = tempfile::tempfile().unwrap();
    let outputs = [log.try_clone().unwrap(), log.try_clone().unwrap()].map(Stdio::from);
    let [stdout, stderr] = outputs;
    let mut child = freetumor()
        .args(arguments)
        .stdout(stdout)
        .stderr(stderr)
        .spawn()
        .expect("the binary starts");
    let started = Instant::now();
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break status,
            None if started.elapsed() > PATIENCE => {
                child.kill().unwrap();
                child.wait().unwrap();
                panic!("{arguments:?} hangs");
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    let (mut log, mut bytes) = (log, Vec::new());
    log.rewind().unwrap();
    log.read_to_end(&mut bytes).unwrap();
    Said {
        code: status.code(),
        text: String::from_utf8_lossy(&bytes).into_owned(),
    }
}

/// A phantom store of four small cases, made once per test process.
pub fn phantom_store() -> &'static Path {
    static STORE: OnceLock<tempfile::TempDir> = OnceLock::new();
    let folder = STORE.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("store");
        let said = run(&[
            "phantom",
            "--store",
            path.to_str().unwrap(),
            "--labelled",
            "2",
            "--unlabelled",
            "2",
            "--seed",
            "5",
        ]);
        assert_eq!(said.code, Some(0), "{}", said.text);
        folder
    });
    Box::leak(folder.path().join("store").into_boxed_path())
}

/// A copy of the phantom store that a test may damage.
pub fn store_copy() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    copy_tree(phantom_store(), folder.path());
    folder
}

fn copy_tree(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_tree(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// The smallest critic: one step on cubes of 16 voxels.
const TINY_CRITIC: &str = "[plan]
spacing_mm = [2.0, 2.0, 2.0]
patch = [64, 64, 64]
[critic]
widths = [2, 2]
steps = 1
max_cube = 16
voxels_per_step = 4096
[critic.held_out]
cases = 0
";

/// A folder of models: a critic that has learned nothing, trained once per test process.
pub fn models() -> PathBuf {
    static MODELS: OnceLock<tempfile::TempDir> = OnceLock::new();
    let folder = MODELS.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
        std::fs::write(path("tiny.toml"), TINY_CRITIC).unwrap();
        let store = phantom_store().to_str().unwrap();
        let said = run(&[
            "train",
            "critic",
            "--config",
            &path("tiny.toml"),
            "--store",
            store,
            "--out",
            &path("models"),
        ]);
        assert_eq!(said.code, Some(0), "{}", said.text);
        folder
    });
    folder.path().join("models")
}

/// A running server.
pub struct Server {
    child: Child,
    /// Such as `127.0.0.1:40123`.
    pub address: String,
}

impl Server {
    /// Starts a server on a free port and waits until it is ready.
    pub fn start(store: &Path, extra: &[&str]) -> Self {
        let mut command = freetumor();
        command
            .args([
                "serve",
                "--config",
                "configs/demo.toml",
                "--bind",
                "127.0.0.1:0",
                "--store",
            ])
            .arg(store)
            .args(extra);
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("the server starts");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let address = loop {
            let line = lines
                .next()
                .expect("the server prints its address before it ends")
                .unwrap();
            if let Some((_, rest)) = line.split_once("http://") {
                break rest.split(['/', ' ']).next().unwrap().to_string();
            }
        };
        std::thread::spawn(move || lines.for_each(drop));
        let server = Self { child, address };
        let started = Instant::now();
        while server.get("/readyz").status != 200 {
            assert!(
                started.elapsed() < Duration::from_secs(60),
                "the server is not ready after a minute"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        server
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends the server without warning.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Asks the server to drain and returns its exit code.
    pub fn terminate(mut self) -> Option<i32> {
        Command::new("kill")
            .args(["-TERM", &self.child.id().to_string()])
            .status()
            .unwrap();
        self.child.wait().unwrap().code()
    }

    /// GET.
    pub fn get(&self, path: &str) -> Answer {
        request(
            &self.address,
            &format!(
                "GET {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n",
                self.address
            ),
            b"",
        )
    }

    /// POST of JSON.
    pub fn post(&self, path: &str, body: &[u8]) -> Answer {
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            self.address,
            body.len()
        );
        request(&self.address, &head, body)
    }

    /// Opens a stream and returns the socket after the response's head.
    pub fn open_stream(&self, body: &str) -> TcpStream {
        let mut socket = TcpStream::connect(&self.address).unwrap();
        let head = format!(
            "POST /v1/stream HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            self.address,
            body.len()
        );
        socket.write_all(head.as_bytes()).unwrap();
        socket
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // A server that already ended has nothing left to kill.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A whole HTTP response; chunked bodies are joined.
pub struct Answer {
    /// The status code; 0 where the server closed without one.
    pub status: u16,
    /// Head lines in lower case.
    pub head: String,
    /// The body.
    pub body: Vec<u8>,
}

impl Answer {
    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }
}

fn request(address: &str, head: &str, body: &[u8]) -> Answer {
    let none = Answer {
        status: 0,
        head: String::new(),
        body: Vec::new(),
    };
    let Ok(mut socket) = TcpStream::connect(address) else {
        return none;
    };
    socket.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
    socket.write_all(head.as_bytes()).unwrap();
    // A server that refuses a body by its length may close before it has read it all.
    drop(socket.write_all(body));
    let mut bytes = Vec::new();
    drop(socket.read_to_end(&mut bytes));
    let Some(split) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else {
        return none;
    };
    let head = String::from_utf8_lossy(&bytes[..split]).to_lowercase();
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
    let raw = &bytes[split + 4..];
    let body = if head.contains("transfer-encoding: chunked") {
        unchunk(raw)
    } else {
        raw.to_vec()
    };
    Answer { status, head, body }
}

/// Joins the chunks of a chunked body, as far as they came.
pub fn unchunk(mut raw: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    while let Some(line) = raw.windows(2).position(|window| window == b"\r\n") {
        let Ok(size) = usize::from_str_radix(String::from_utf8_lossy(&raw[..line]).trim(), 16) else {
            break;
        };
        let rest = &raw[line + 2..];
        let take = size.min(rest.len());
        body.extend_from_slice(&rest[..take]);
        if size == 0 || rest.len() < size + 2 {
            break;
        }
        raw = &rest[size + 2..];
    }
    body
}

/// Writes a little-endian NIfTI-1 file byte by byte, independent of the crate's own writer.
pub struct Nifti<'a> {
    /// dim[0..]: rank and sizes.
    pub dim: &'a [i16],
    /// Spacing x, y, z in mm.
    pub spacing: [f32; 3],
    /// 16 float32, 4 int16, 2 uint8.
    pub datatype: i16,
    /// The voxels' bytes.
    pub data: &'a [u8],
}

impl Nifti<'_> {
    /// Returns the file's bytes, with an sform of the spacing and no offset.
    pub fn bytes(&self) -> Vec<u8> {
        let mut head = vec![0u8; 352];
        head[0..4].copy_from_slice(&348i32.to_le_bytes());
        for (i, size) in self.dim.iter().enumerate() {
            head[40 + 2 * i..42 + 2 * i].copy_from_slice(&size.to_le_bytes());
        }
        head[70..72].copy_from_slice(&self.datatype.to_le_bytes());
        let bits: i16 = match self.datatype {
            2 => 8,
            4 => 16,
            _ => 32,
        };
        head[72..74].copy_from_slice(&bits.to_le_bytes());
        let floats = [1.0, self.spacing[0], self.spacing[1], self.spacing[2]];
        for (i, value) in floats.iter().enumerate() {
            head[76 + 4 * i..80 + 4 * i].copy_from_slice(&value.to_le_bytes());
        }
        head[108..112].copy_from_slice(&352f32.to_le_bytes());
        head[112..116].copy_from_slice(&1f32.to_le_bytes());
        head[254..256].copy_from_slice(&1i16.to_le_bytes());
        for axis in 0..3 {
            let at = 280 + 16 * axis + 4 * axis;
            head[at..at + 4].copy_from_slice(&self.spacing[axis].to_le_bytes());
        }
        head[344..348].copy_from_slice(b"n+1\0");
        head.extend_from_slice(self.data);
        head
    }
}

//! Spans as a collector receives them: `cargo test --release --features otlp --test otlp`.

#![cfg(feature = "otlp")]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

/// Accepts exports as a collector does; hands over paths and bodies.
fn collector() -> (String, Receiver<(String, Vec<u8>)>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (sender, received) = channel();
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            serve(connection.unwrap(), &mut |export| drop(sender.send(export)));
        }
    });
    (format!("http://{address}"), received)
}

fn serve(mut connection: TcpStream, received: &mut dyn FnMut((String, Vec<u8>))) {
    let mut reader = BufReader::new(connection.try_clone().unwrap());
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if reader.read_line(&mut head).unwrap() == 0 {
                return;
            }
        }
        let field = |name: &str| {
            let lines = head.lines().filter_map(|line| line.split_once(':'));
            let mut found = lines.filter(|(key, _)| key.eq_ignore_ascii_case(name));
            found.next().map(|(_, value)| value.trim().to_string())
        };
        assert_eq!(field("content-type").unwrap(), "application/x-protobuf");
        let mut body = vec![0; field("content-length").unwrap().parse().unwrap()];
        reader.read_exact(&mut body).unwrap();
        received((head.split(' ').nth(1).unwrap().to_string(), body));
        write!(connection, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").unwrap();
    }
}

#[test]
fn a_request_is_a_span_of_the_callers_trace() {
    let (url, received) = collector();
    let mut server = Command::new(env!("CARGO_BIN_EXE_freetumor"))
        .args(["serve", "--bind", "127.0.0.1:0", "--store"])
        .arg(support::phantom_store())
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", &url)
        .env("FREETUMOR__LOG__LEVEL", "info,freetumor=debug")
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(server.stdout.take().unwrap()).lines();
    let address = loop {
        let line = lines.next().expect("the server prints its address").unwrap();
        if let Some((_, rest)) = line.split_once("http://") {
            break rest.split(['/', ' ']).next().unwrap().to_string();
        }
    };
    std::thread::spawn(move || lines.for_each(drop));
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let answer = ureq::get(format!("http://{address}/v1/info"))
        .header("traceparent", parent)
        .header("x-request-id", "asked-1")
        .call()
        .unwrap();
    assert_eq!(answer.status(), 200);
    let batch = ureq::get(format!("http://{address}/v1/batch")).call().unwrap();
    assert_eq!(batch.status(), 200);
    Command::new("kill")
        .args(["-TERM", &server.id().to_string()])
        .status()
        .unwrap();
    assert!(server.wait().unwrap().success());

    // What was not sent yet is sent before the process ends. Strings and ids stand in protobuf as they are.
    let mut bytes = Vec::new();
    while let Ok((path, body)) = received.recv_timeout(Duration::from_secs(1)) {
        assert_eq!(path, "/v1/traces");
        bytes.extend(body);
    }
    let holds = |wanted: &[u8]| bytes.windows(wanted.len()).any(|window| window == wanted);
    let unhex = |text: &str| -> Vec<u8> {
        let digits = (0..text.len()).step_by(2);
        digits
            .map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap())
            .collect()
    };
    for text in [
        "service.name",
        "freetumor",
        "request",
        "request_id",
        "asked-1",
        "/v1/info",
        // What was made for the batch, and how.
        "patch",
        "recipe",
        "stage",
        "read",
        "lesion",
        "encode",
    ] {
        assert!(holds(text.as_bytes()), "{text}");
    }
    // The caller's trace, and its span as the parent.
    let ids: Vec<&str> = parent.split('-').collect();
    assert!(holds(&unhex(ids[1])) && holds(&unhex(ids[2])));
}

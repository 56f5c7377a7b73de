//! TLS with a certificate of the test's own.

mod support;

use std::{
    io::{Read, Write},
    net::TcpStream,
    sync::Arc,
};

use ds4_server::TlsFiles;
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned,
    pki_types::{CertificateDer, ServerName},
};
use support::{Running, client::send, config};

/// A certificate for this machine in a folder of its own, and the settings that use it.
fn certified() -> (tempfile::TempDir, CertificateDer<'static>, TlsFiles) {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let files = TlsFiles {
        certificates: folder.path().join("certificate.pem"),
        key: folder.path().join("key.pem"),
    };
    std::fs::write(&files.certificates, made.cert.pem()).unwrap();
    std::fs::write(&files.key, made.signing_key.serialize_pem()).unwrap();
    (folder, made.cert.der().clone(), files)
}

fn connect(
    running: &Running,
    trusted: Option<CertificateDer<'static>>,
) -> StreamOwned<ClientConnection, TcpStream> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(trusted);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("localhost").unwrap();
    let connection = ClientConnection::new(Arc::new(config), name).unwrap();
    StreamOwned::new(connection, TcpStream::connect(running.address).unwrap())
}

#[test]
fn answers_come_encrypted_and_only_so() {
    let (_folder, certificate, files) = certified();
    let mut config = config();
    config.tls = Some(files);
    let running = Running::scripted(config);
    let body =
        r#"{"messages":[{"role":"user","content":"[text]"}],"thinking":false,"stream":true}"#;
    let request = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut stream = connect(&running, Some(certificate));
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    // The server may close without a goodbye once everything is said.
    let _ = stream.read_to_string(&mut answer);
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.contains("data: [DONE]"), "{answer}");

    let mut distrustful = connect(&running, None);
    assert!(
        distrustful.write_all(request.as_bytes()).is_err(),
        "an unknown certificate will not do"
    );
    assert_eq!(send(running.address, &request).status, 0, "nothing is said in the clear");
}

#[test]
fn files_that_are_no_certificates_are_named() {
    let (folder, _, mut files) = certified();
    files.certificates = folder.path().join("missing.pem");
    let mut config = config();
    config.tls = Some(files);
    let error = Running::briefly(config).unwrap_err().to_string();
    assert!(error.contains("missing.pem"), "{error}");
}

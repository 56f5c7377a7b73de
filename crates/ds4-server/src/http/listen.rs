//! Sockets: plain or TLS, with bounds on what a connection may take.

use std::{
    future::{Ready, ready},
    io,
    net::{SocketAddr, TcpListener},
    path::PathBuf,
    pin::Pin,
};

use axum::Router;
use axum_server::{
    Handle,
    accept::Accept,
    tls_rustls::{RustlsAcceptor, RustlsConfig},
};
use hyper_util::{rt::TokioExecutor, server::conn::auto::Builder};
use tokio::net::TcpStream;
use tokio_io_timeout::TimeoutStream;

use super::app::HttpLimits;

/// Files for TLS, in PEM.
#[derive(Debug, Clone)]
pub struct TlsFiles {
    /// Certificates, the server's own first.
    pub certificates: PathBuf,
    /// The private key.
    pub key: PathBuf,
}

/// Serves until `handle` says to stop.
pub(crate) async fn serve(
    listener: TcpListener,
    tls: Option<&TlsFiles>,
    limits: HttpLimits,
    router: Router,
    handle: Handle<SocketAddr>,
) -> io::Result<()> {
    let service = router.into_make_service_with_connect_info::<SocketAddr>();
    let patient = Patient { limits };
    let Some(files) = tls else {
        let mut server = axum_server::from_tcp(listener)?.acceptor(patient).handle(handle);
        bound(server.http_builder(), limits);
        return server.serve(service).await;
    };
    // It fails if a server in the same process has installed it already, which is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let config = RustlsConfig::from_pem_file(&files.certificates, &files.key).await;
    let config = config.map_err(|error| {
        let (certificates, key) = (files.certificates.display(), files.key.display());
        let text = format!("TLS with certificates {certificates} and key {key}: {error}");
        io::Error::new(error.kind(), text)
    })?;
    let acceptor = RustlsAcceptor::new(config).acceptor(patient);
    let mut server = axum_server::from_tcp(listener)?.acceptor(acceptor).handle(handle);
    bound(server.http_builder(), limits);
    server.serve(service).await
}

/// Bounds the headers in size and time.
fn bound(builder: &mut Builder<TokioExecutor>, limits: HttpLimits) {
    /// The least that the HTTP implementation takes.
    const LEAST: usize = 8192;
    builder
        .http1()
        .header_read_timeout(limits.read_timeout)
        .max_buf_size(limits.header_bytes.max(LEAST));
}

/// Accepts connections, and drops those whose clients take nothing for too long.
#[derive(Debug, Clone)]
struct Patient {
    limits: HttpLimits,
}

impl<S> Accept<TcpStream, S> for Patient {
    type Stream = Pin<Box<TimeoutStream<TcpStream>>>;
    type Service = S;
    type Future = Ready<io::Result<(Self::Stream, S)>>;

    fn accept(&self, stream: TcpStream, service: S) -> Self::Future {
        let bounded = stream.set_nodelay(true).map(|()| {
            let mut stream = TimeoutStream::new(stream);
            stream.set_write_timeout(Some(self.limits.write_timeout));
            (Box::pin(stream), service)
        });
        ready(bounded)
    }
}

//! Who may ask: tokens, and for browsers the pages that may.

use std::net::{IpAddr, SocketAddr};

use axum::http::{HeaderMap, StatusCode, Uri, header};
use subtle::ConstantTimeEq;

use super::error::ApiError;

/// Rules of access.
#[derive(Debug, Clone, Default)]
pub(crate) struct Access {
    tokens: Vec<String>,
    /// Pages from anywhere may ask.
    any_origin: bool,
    /// Only names of this machine are its names, so that no page of another name can be given
    /// this machine's address and then ask.
    local_names_only: bool,
}

impl Access {
    /// Rules for a server at `address`.
    pub(crate) fn new(tokens: Vec<String>, any_origin: bool, address: SocketAddr) -> Self {
        Access { tokens, any_origin, local_names_only: address.ip().is_loopback() }
    }

    /// Checks where a request comes from, for every route.
    pub(crate) fn check_origin(&self, uri: &Uri, headers: &HeaderMap) -> Result<(), ApiError> {
        let forbidden = |message: String| ApiError::new(StatusCode::FORBIDDEN, message);
        let host = headers.get(header::HOST).map(|host| host.to_str().unwrap_or_default());
        let host = host.or_else(|| uri.authority().map(|authority| authority.as_str()));
        if self.local_names_only && !host.is_some_and(|host| is_local_name(host_name(host))) {
            let found = host.unwrap_or("none");
            return Err(forbidden(format!("host {found:.80} is not a name of this machine")));
        }
        let Some(origin) = headers.get(header::ORIGIN) else { return Ok(()) };
        let origin = origin.to_str().unwrap_or_default();
        let own = origin.split_once("://").is_some_and(|(_, authority)| Some(authority) == host);
        if own || self.any_origin {
            return Ok(());
        }
        Err(forbidden(format!(
            "pages of {origin:.80} may not ask this server: allow them with --cors"
        )))
    }

    /// Checks a request's token; any of the known ones will do. Returns its number, and 0 where
    /// none is needed.
    pub(crate) fn check_token(&self, headers: &HeaderMap) -> Result<usize, ApiError> {
        if self.tokens.is_empty() {
            return Ok(0);
        }
        let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
        let bearer = text("authorization").and_then(|value| {
            let (scheme, token) = value.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
        });
        let given = bearer.or_else(|| text("x-api-key")).unwrap_or_default();
        let mut found = None;
        for (index, token) in self.tokens.iter().enumerate() {
            if bool::from(token.as_bytes().ct_eq(given.as_bytes())) {
                found = Some(index + 1);
            }
        }
        found.ok_or_else(|| {
            let message = "this server needs a token: send it as a bearer token or as x-api-key";
            ApiError::new(StatusCode::UNAUTHORIZED, message)
        })
    }
}

/// A host without its port.
fn host_name(host: &str) -> &str {
    match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    }
}

fn is_local_name(name: &str) -> bool {
    let is_loopback = name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    is_loopback || name.eq_ignore_ascii_case("localhost") || name.ends_with(".localhost")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.insert(*name, value.parse().unwrap());
        }
        headers
    }

    fn access(tokens: &[&str], any_origin: bool, address: &str) -> Access {
        let tokens = tokens.iter().map(|token| token.to_string()).collect();
        Access::new(tokens, any_origin, address.parse().unwrap())
    }

    fn origin(access: &Access, pairs: &[(&'static str, &str)]) -> bool {
        access.check_origin(&Uri::from_static("/"), &headers(pairs)).is_ok()
    }

    #[test]
    fn only_local_names_on_loopback() {
        let local = access(&[], false, "127.0.0.1:8000");
        for host in ["127.0.0.1:8000", "localhost:8000", "[::1]:8000", "ds4.localhost"] {
            assert!(origin(&local, &[("host", host)]), "{host}");
        }
        for host in ["example.com", "127.0.0.1.example.com:8000", "", "[::2]"] {
            assert!(!origin(&local, &[("host", host)]), "{host}");
        }
        assert!(!origin(&local, &[]));
        assert!(origin(&access(&[], false, "0.0.0.0:8000"), &[("host", "example.com")]));
    }

    #[test]
    fn foreign_pages_need_leave() {
        let host = ("host", "localhost:8000");
        let local = access(&[], false, "127.0.0.1:8000");
        assert!(origin(&local, &[host, ("origin", "http://localhost:8000")]));
        assert!(!origin(&local, &[host, ("origin", "http://localhost:9000")]));
        assert!(!origin(&local, &[host, ("origin", "https://example.com")]));
        assert!(!origin(&local, &[host, ("origin", "null")]));
        let open = access(&[], true, "127.0.0.1:8000");
        assert!(origin(&open, &[host, ("origin", "https://example.com")]));
    }

    #[test]
    fn any_known_token_will_do() {
        let access = access(&["first", "second"], false, "127.0.0.1:8000");
        let number = |pairs: &[(&'static str, &str)]| access.check_token(&headers(pairs)).ok();
        assert_eq!(number(&[("authorization", "Bearer first")]), Some(1));
        assert_eq!(number(&[("authorization", "bearer second")]), Some(2));
        assert_eq!(number(&[("x-api-key", "second")]), Some(2));
        for pairs in [
            &[][..],
            &[("x-api-key", "")],
            &[("x-api-key", "firs")],
            &[("authorization", "Basic first")],
        ] {
            assert_eq!(number(pairs), None);
        }
    }
}

//! A blocking HTTPS client, which shares nothing with the server but the TLS library.

use super::super::ApiServer;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use serde_json::Value;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(10);

pub(super) struct Client {
    address: std::net::SocketAddr,
    config: Arc<ClientConfig>,
    pub(super) token: String,
}

/// An answer; of a watch the part that has come yet.
pub(super) struct Answer {
    pub(super) code: u16,
    pub(super) headers: String,
    stream: BufReader<StreamOwned<ClientConnection, TcpStream>>,
}

pub(super) const MERGE: &str = "application/merge-patch+json";
pub(super) const STRATEGIC: &str = "application/strategic-merge-patch+json";
pub(super) const JSON: &str = "application/json";

impl Client {
    pub(super) fn new(server: &ApiServer, token: &str) -> Client {
        let mut roots = RootCertStore::empty();
        let ca = CertificateDer::from_pem_slice(server.ca().as_bytes()).unwrap();
        roots.add(ca).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        Client {
            address: server.address(),
            config: Arc::new(config),
            token: token.to_owned(),
        }
    }

    /// One who may do everything.
    pub(super) fn admin(server: &ApiServer) -> Client {
        Client::new(server, &server.token_of("kubernetes-admin"))
    }

    /// The service account.
    pub(super) fn flannel(server: &ApiServer) -> Client {
        Client::new(server, &server.token())
    }

    pub(super) fn try_send(
        &self,
        method: &str,
        path: &str,
        content_type: &str,
        body: &str,
    ) -> std::io::Result<Answer> {
        let stream = TcpStream::connect_timeout(&self.address, LIMIT)?;
        stream.set_read_timeout(Some(LIMIT))?;
        let name = ServerName::from(self.address.ip());
        let tls = ClientConnection::new(Arc::clone(&self.config), name).unwrap();
        let mut stream = StreamOwned::new(tls, stream);
        let auth = match self.token.as_str() {
            "" => String::new(),
            token => format!("Authorization: Bearer {token}\r\n"),
        };
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: x\r\nUser-Agent: tester/1\r\n{auth}Content-Type: {content_type}\r\n\
             Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        )?;
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        stream.read_line(&mut line)?;
        let code = line.split(' ').nth(1).and_then(|code| code.parse().ok());
        let code = code.ok_or(std::io::ErrorKind::UnexpectedEof)?;
        let mut headers = String::new();
        loop {
            let mut line = String::new();
            stream.read_line(&mut line)?;
            if line.trim().is_empty() {
                break;
            }
            headers.push_str(&line.to_lowercase());
        }
        Ok(Answer {
            code,
            headers,
            stream,
        })
    }

    #[track_caller]
    pub(super) fn send(&self, method: &str, path: &str, content_type: &str, body: &str) -> Answer {
        self.try_send(method, path, content_type, body).unwrap()
    }

    /// The status code and the object.
    #[track_caller]
    pub(super) fn get(&self, path: &str) -> (u16, Value) {
        self.send("GET", path, JSON, "").object()
    }

    #[track_caller]
    pub(super) fn patch(&self, path: &str, content_type: &str, patch: &Value) -> (u16, Value) {
        self.send("PATCH", path, content_type, &patch.to_string())
            .object()
    }

    #[track_caller]
    pub(super) fn post(&self, path: &str, object: &Value) -> (u16, Value) {
        self.send("POST", path, JSON, &object.to_string()).object()
    }
}

impl Answer {
    /// The whole body.
    pub(super) fn text(mut self) -> String {
        if !self.headers.contains("chunked") {
            let mut text = String::new();
            // A server that closes without a farewell is as good here.
            drop(self.stream.read_to_string(&mut text));
            return text;
        }
        let mut text = Vec::new();
        while let Some(chunk) = self.chunk().unwrap() {
            text.extend(chunk);
        }
        String::from_utf8(text).unwrap()
    }

    #[track_caller]
    pub(super) fn object(self) -> (u16, Value) {
        let code = self.code;
        let text = self.text();
        let value = serde_json::from_str(&text);
        (code, value.unwrap_or(Value::String(text)))
    }

    /// The next event of a watch: its type and object. `None` at the end.
    #[track_caller]
    pub(super) fn event(&mut self) -> Option<(String, Value)> {
        self.try_event().unwrap()
    }

    pub(super) fn try_event(&mut self) -> std::io::Result<Option<(String, Value)>> {
        let Some(chunk) = self.chunk()? else {
            return Ok(None);
        };
        assert_eq!(chunk.last(), Some(&b'\n'), "one line a chunk");
        let mut event: Value = serde_json::from_slice(&chunk).unwrap();
        let kind = event["type"].as_str().unwrap().to_owned();
        Ok(Some((kind, event["object"].take())))
    }

    fn chunk(&mut self) -> std::io::Result<Option<Vec<u8>>> {
        let mut size = String::new();
        self.stream.read_line(&mut size)?;
        let size = usize::from_str_radix(size.trim(), 16)
            .map_err(|_| std::io::Error::from(std::io::ErrorKind::UnexpectedEof))?;
        let mut chunk = vec![0; size + 2];
        self.stream.read_exact(&mut chunk)?;
        chunk.truncate(size);
        Ok((size > 0).then_some(chunk))
    }
}

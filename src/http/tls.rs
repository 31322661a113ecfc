//! TLS: certificate and key from PEM files, exchanged without cutting a connection.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::{ClientHello, ResolvesServerCert};
use tokio_rustls::rustls::sign::CertifiedKey;
use tokio_rustls::rustls::{Error, ServerConfig};

/// A certificate or key that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file that cannot be read, or is no PEM.
    #[error("server.{setting}: {path}: {source}")]
    File {
        /// The setting.
        setting: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: pem::Error,
    },
    /// A file without a certificate.
    #[error("server.tls_certificate: {0}: no certificate in it")]
    Empty(PathBuf),
    /// A key of another certificate, or of a kind that is not supported.
    #[error("server.tls_key: it does not belong to the certificate, or is not supported: {0}")]
    Mismatch(Error),
}

/// The certificate in use, which connections made later may find exchanged.
#[derive(Debug)]
pub(super) struct Certificate {
    certificate: PathBuf,
    key: PathBuf,
    current: RwLock<Arc<CertifiedKey>>,
}

impl Certificate {
    /// Reads both files.
    pub fn load(certificate: &Path, key: &Path) -> Result<Arc<Self>, TlsError> {
        Ok(Arc::new(Self {
            current: RwLock::new(read(certificate, key)?),
            certificate: certificate.into(),
            key: key.into(),
        }))
    }

    /// Reads both files again; where they cannot be used, what is in use stays.
    pub fn reload(&self) -> Result<(), TlsError> {
        let fresh = read(&self.certificate, &self.key)?;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = fresh;
        Ok(())
    }

    /// Returns what turns a TCP connection into one with TLS 1.2 or 1.3.
    pub fn acceptor(self: &Arc<Self>) -> TlsAcceptor {
        let builder = ServerConfig::builder_with_provider(provider());
        let mut config = builder
            .with_safe_default_protocol_versions()
            .expect("ring supports TLS 1.2 and 1.3")
            .with_no_client_auth()
            .with_cert_resolver(self.clone());
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        TlsAcceptor::from(Arc::new(config))
    }
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current.read().unwrap_or_else(PoisonError::into_inner).clone())
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn read(certificate: &Path, key: &Path) -> Result<Arc<CertifiedKey>, TlsError> {
    let file = |setting, path: &Path| {
        let path = path.to_path_buf();
        move |source| TlsError::File { setting, path, source }
    };
    let chain: Result<Vec<_>, _> = CertificateDer::pem_file_iter(certificate).and_then(Iterator::collect);
    let chain = chain.map_err(file("tls_certificate", certificate))?;
    if chain.is_empty() {
        return Err(TlsError::Empty(certificate.into()));
    }
    let secret = PrivateKeyDer::from_pem_file(key).map_err(file("tls_key", key))?;
    // Refuses a pair that does not belong together, as when only one of both files is the new one yet.
    let certified = CertifiedKey::from_der(chain, secret, &provider()).map_err(TlsError::Mismatch)?;
    Ok(Arc::new(certified))
}

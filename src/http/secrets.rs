//! Keys and certificate, read again when their files change.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::keys::{Keys, KeysError};
use super::settings::ServerConfig;
use super::tls::{Certificate, TlsError};
use crate::digest::Digest;

/// A file of keys, or a certificate, that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SecretsError {
    /// Keys.
    #[error(transparent)]
    Keys(#[from] KeysError),
    /// Certificate or its key.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// Keys and certificate as they are in use.
pub(super) struct Secrets {
    config: ServerConfig,
    keys: RwLock<Arc<Keys>>,
    certificate: Option<Arc<Certificate>>,
    /// What the files held when they were last looked at.
    seen: Mutex<Digest>,
}

impl Secrets {
    /// Reads every file that the settings name.
    pub fn load(config: &ServerConfig) -> Result<Self, SecretsError> {
        let certificate = match (&config.tls_certificate, &config.tls_key) {
            (Some(certificate), Some(key)) => Some(Certificate::load(certificate, key)?),
            _ => None,
        };
        Ok(Self {
            keys: RwLock::new(Arc::new(Keys::load(config)?)),
            certificate,
            seen: Mutex::new(contents(config)),
            config: config.clone(),
        })
    }

    /// Returns the keys in use.
    pub fn keys(&self) -> Arc<Keys> {
        self.keys.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns the certificate, where the server speaks TLS.
    pub fn certificate(&self) -> Option<&Arc<Certificate>> {
        self.certificate.as_ref()
    }

    /// Reads every file again; where one cannot be used, what it held before stays in use.
    pub fn reload(&self) -> Result<(), SecretsError> {
        let keys = Keys::load(&self.config).map(|keys| {
            *self.keys.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(keys);
        });
        let certificate = self.certificate.as_ref().map_or(Ok(()), |held| held.reload());
        keys?;
        certificate?;
        tracing::info!("keys and certificate were read again");
        Ok(())
    }

    /// The same, where a file holds something else than when it was last looked at.
    pub fn reload_if_changed(&self) {
        let now = contents(&self.config);
        let before = std::mem::replace(&mut *self.seen.lock().unwrap_or_else(PoisonError::into_inner), now);
        if before == now {
            return;
        }
        if let Err(error) = self.reload() {
            let error: &dyn std::error::Error = &error;
            tracing::error!(error, "keys or certificate cannot be used; the old ones stay");
        }
    }
}

/// Returns a digest of what the files hold; a file that cannot be read holds nothing.
fn contents(config: &ServerConfig) -> Digest {
    let files = [
        &config.read_keys_file,
        &config.admin_keys_file,
        &config.tls_certificate,
        &config.tls_key,
    ];
    let read = |path: &Path| fs_err::read(path).unwrap_or_default();
    let digests = files.map(|file| {
        file.as_deref()
            .map_or(Digest::default(), |path| Digest::of(&read(path)))
    });
    Digest::of_json(&digests)
}

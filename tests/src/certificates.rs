//! Certificates for trials with encrypted page transfer, made anew for each.

use std::fs;
use std::path::Path;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, KeyUsagePurpose};

/// Makes an authority in `folder`, and a certificate for 127.0.0.1 that it has signed; answers with the words that make a
/// tool show the one and trust the other.
///
/// # Errors
/// When they cannot be made or written.
pub fn make(folder: &Path) -> Result<Vec<String>, String> {
    let wrong = |e: rcgen::Error| format!("make a certificate: {e}");
    let mut params = CertificateParams::new(vec![]).map_err(wrong)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate().map_err(wrong)?;
    let authority = params.self_signed(&key).map_err(wrong)?.pem();
    let issuer = Issuer::new(params, key);
    let own = CertificateParams::new(vec!["127.0.0.1".to_owned()]).map_err(wrong)?;
    let key = KeyPair::generate().map_err(wrong)?;
    let certificate = own.signed_by(&key, &issuer).map_err(wrong)?.pem();
    let mut words = vec!["--tls".to_owned()];
    let files = [("cacert", authority), ("cert", certificate), ("key", key.serialize_pem())];
    for (name, text) in files {
        let path = folder.join(format!("{name}.pem"));
        fs::write(&path, text).map_err(|e| format!("write {}: {e}", path.display()))?;
        words.extend([format!("--tls-{name}"), path.display().to_string()]);
    }
    Ok(words)
}

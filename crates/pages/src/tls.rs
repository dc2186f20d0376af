//! Connections for pages that are encrypted, and whose ends know each other by their certificates (`--tls`).
//!
//! Both sides show one, and both want one that a trusted authority has signed and not revoked; who connects also wants the
//! name in it to be that of the host it connects to.
//!
//! Who connects speaks TLS 1.2: there the other end has looked at its certificate before the agreement is complete. In 1.3 it
//! would hear of a refusal only when it has begun, and a tree could run there that has its memory here. Who is connected to
//! speaks both, as CRIU's GnuTLS does.

use crate::server::Connection;
use model::{Failure, Object, Options, Remedy};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, ServerConfig,
    SignatureScheme,
};
use std::io::{self, Read, Write};
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;

/// What one end shows, and what it wants of the other.
struct Identity {
    trusted: Arc<RootCertStore>,
    revoked: Vec<CertificateRevocationListDer<'static>>,
    own: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    provider: Arc<CryptoProvider>,
}

fn about(path: &Path) -> Object {
    Object::Path(path.display().to_string())
}

/// Everything of one sort in a PEM file.
fn read<T: PemObject>(path: &Path, doing: &'static str) -> Result<Vec<T>, Failure> {
    let wrong =
        |error: rustls::pki_types::pem::Error| Failure::conflict(about(path), doing, error.to_string());
    let found = T::pem_file_iter(path).map_err(wrong)?.collect::<Result<Vec<T>, _>>().map_err(wrong)?;
    match found.is_empty() {
        true => Err(Failure::conflict(about(path), doing, "has none, in the form of PEM")),
        false => Ok(found),
    }
}

fn unfit(error: &Error) -> Failure {
    Failure::conflict(Object::Named("--tls".into()), "use the certificates", error.to_string())
}

impl Identity {
    fn read(options: &Options) -> Result<Identity, Failure> {
        let mut trusted = RootCertStore::empty();
        let authorities = read::<CertificateDer>(&options.tls_cacert, "read the trusted certificates")?;
        for certificate in authorities {
            trusted.add(certificate).map_err(|error| {
                Failure::conflict(about(&options.tls_cacert), "trust a certificate", error.to_string())
            })?;
        }
        // The usual place may be empty; one that was named may not.
        let is_usual = options.tls_cacrl == Options::default().tls_cacrl;
        let revoked = match is_usual && !options.tls_cacrl.exists() {
            true => Vec::new(),
            false => read(&options.tls_cacrl, "read the revoked certificates")?,
        };
        let own = read(&options.tls_cert, "read our certificate")?;
        let key = PrivateKeyDer::from_pem_file(&options.tls_key).map_err(|error| {
            Failure::conflict(about(&options.tls_key), "read our private key", error.to_string())
        })?;
        let provider = Arc::new(ring::default_provider());
        Ok(Identity { trusted: Arc::new(trusted), revoked, own, key, provider })
    }

    fn into_client(self, takes_any_name: bool) -> Result<ClientConfig, Failure> {
        let verifier = WebPkiServerVerifier::builder_with_provider(self.trusted, self.provider.clone())
            .with_crls(self.revoked)
            .build()
            .map_err(|error| unfit(&Error::General(error.to_string())))?;
        let verifier: Arc<dyn ServerCertVerifier> =
            if takes_any_name { Arc::new(AnyName(verifier)) } else { verifier };
        ClientConfig::builder_with_provider(self.provider)
            .with_protocol_versions(&[&rustls::version::TLS12])
            .map_err(|error| unfit(&error))?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_auth_cert(self.own, self.key)
            .map_err(|error| unfit(&error))
    }

    fn into_server(self) -> Result<ServerConfig, Failure> {
        let verifier = WebPkiClientVerifier::builder_with_provider(self.trusted, self.provider.clone())
            .with_crls(self.revoked)
            .build()
            .map_err(|error| unfit(&Error::General(error.to_string())))?;
        let mut config = ServerConfig::builder_with_provider(self.provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| unfit(&error))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(self.own, self.key)
            .map_err(|error| unfit(&error))?;
        // Nobody comes again; and CRIU takes such a message in the place of an answer for a failure.
        config.send_tls13_tickets = 0;
        Ok(config)
    }
}

/// Wants a good certificate, whatever name is in it (`--tls-no-cn-verify`).
#[derive(Debug)]
struct AnyName(Arc<WebPkiServerVerifier>);

impl ServerCertVerifier for AnyName {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        // The name is looked at last, when all else is good.
        match self.0.verify_server_cert(certificate, others, name, ocsp, now) {
            Err(Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            other => other,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

/// One end of connections to come, made before any is.
pub struct Securing(Side);

enum Side {
    Client(Arc<ClientConfig>, ServerName<'static>),
    Server(Arc<ServerConfig>),
}

impl std::fmt::Debug for Securing {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("Securing")
    }
}

impl Securing {
    /// For who connects; nothing without `--tls`.
    ///
    /// # Errors
    /// When a file cannot be read, or is not what it should be.
    pub fn client(options: &Options) -> Result<Option<Securing>, Failure> {
        if !options.tls {
            return Ok(None);
        }
        let name = match (&options.address, options.tls_no_cn_verify) {
            (Some(host), _) => ServerName::try_from(host.clone()).map_err(|_| {
                let why = "is no name that a certificate can have";
                Failure::conflict(Object::Named(format!("--address {host}")), "", why)
            })?,
            // It is sent, but not compared.
            (None, true) => ServerName::IpAddress(std::net::Ipv4Addr::LOCALHOST.into()),
            (None, false) => {
                let why = "what name the other end has to have is not known";
                let advice = "--address says it, and --tls-no-cn-verify does without";
                let failure = Failure::conflict(Object::Named("--tls".into()), "", why);
                return Err(failure.help(Remedy::Advice(advice)));
            }
        };
        let config = Identity::read(options)?.into_client(options.tls_no_cn_verify)?;
        Ok(Some(Securing(Side::Client(Arc::new(config), name))))
    }

    /// For who is connected to; nothing without `--tls`.
    ///
    /// # Errors
    /// As [`Securing::client`].
    pub fn server(options: &Options) -> Result<Option<Securing>, Failure> {
        if !options.tls {
            return Ok(None);
        }
        let config = Identity::read(options)?.into_server()?;
        Ok(Some(Securing(Side::Server(Arc::new(config)))))
    }

    /// Agrees with the other end, as long as `go_on` says so.
    ///
    /// # Errors
    /// When one does not trust the other.
    pub fn secure(
        &self,
        over: Box<dyn Connection>,
        go_on: &dyn Fn() -> Result<(), Failure>,
    ) -> Result<Box<dyn Connection>, Failure> {
        let begun = match &self.0 {
            Side::Client(config, name) => {
                rustls::ClientConnection::new(config.clone(), name.clone()).map(rustls::Connection::Client)
            }
            Side::Server(config) => {
                rustls::ServerConnection::new(config.clone()).map(rustls::Connection::Server)
            }
        };
        let mut secured = Secured { tls: begun.map_err(|error| unfit(&error))?, over };
        while secured.tls.is_handshaking() {
            match secured.tls.complete_io(&mut secured.over) {
                Ok(_) => {}
                Err(error) if is_patience(&error) => go_on()?,
                Err(error) => return Err(refused(&error)),
            }
        }
        Ok(Box::new(secured))
    }
}

/// Has only the time come to ask whether to go on?
fn is_patience(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR))
}

fn refused(error: &io::Error) -> Failure {
    let object = Object::Named("page server".into());
    let Some(cause) = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) else {
        let why = "the other end left: it has no --tls, or does not trust our certificate; its log says why";
        return Failure::conflict(object, "agree on encryption", why);
    };
    let failure = Failure::conflict(object, "agree on encryption", cause.to_string());
    match cause {
        Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => failure.help(Remedy::Advice(
            "its certificate needs the --address as subjectAltName, or --tls-no-cn-verify does without",
        )),
        Error::InvalidCertificate(_) => {
            failure.help(Remedy::Advice("--tls-cacert names the authorities that are trusted"))
        }
        _ => failure,
    }
}

/// A connection that both ends trust.
struct Secured {
    tls: rustls::Connection,
    over: Box<dyn Connection>,
}

impl Secured {
    /// Sends what waits to be sent.
    fn push(&mut self) -> io::Result<()> {
        while self.tls.wants_write() {
            self.tls.write_tls(&mut self.over)?;
        }
        Ok(())
    }
}

impl Read for Secured {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.tls.reader().read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return done,
            }
            self.push()?;
            self.tls.read_tls(&mut self.over)?;
            self.tls
                .process_new_packets()
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        }
    }
}

impl Write for Secured {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Now there is room.
        self.push()?;
        let count = self.tls.writer().write(bytes)?;
        match self.push() {
            // They are taken; the rest goes with the next.
            Err(error) if !is_patience(&error) => Err(error),
            _ => Ok(count),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.push()?;
        self.over.flush()
    }
}

impl Connection for Secured {
    fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.over.socket()
    }
}

impl Drop for Secured {
    fn drop(&mut self) {
        // So that the other end knows that nothing was cut off.
        self.tls.send_close_notify();
        let _ = self.push();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{
        BasicConstraints, CertificateParams, CertificateRevocationListParams, IsCa, Issuer, KeyIdMethod,
        KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber, date_time_ymd,
    };
    use std::fs::{self, File};
    use std::path::PathBuf;

    /// An authority, and a folder for what it signs.
    struct Authority {
        issuer: Issuer<'static, KeyPair>,
        folder: PathBuf,
    }

    impl Authority {
        fn new(name: &str) -> Authority {
            let folder = std::env::temp_dir().join(format!("crtools-tls-{name}-{}", std::process::id()));
            fs::create_dir_all(&folder).unwrap();
            let mut params = CertificateParams::new(vec![]).unwrap();
            params.distinguished_name.push(rcgen::DnType::CommonName, name);
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
            let key = KeyPair::generate().unwrap();
            fs::write(folder.join("ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
            Authority { issuer: Issuer::new(params, key), folder }
        }

        /// Signs a certificate with a number for a host, and answers with the options to show it.
        fn sign(&self, number: u64, host: &str) -> Options {
            let mut params = CertificateParams::new(vec![host.to_owned()]).unwrap();
            params.serial_number = Some(SerialNumber::from(number));
            let key = KeyPair::generate().unwrap();
            let (cert, own) =
                (self.folder.join(format!("{number}.pem")), self.folder.join(format!("{number}.key")));
            fs::write(&cert, params.signed_by(&key, &self.issuer).unwrap().pem()).unwrap();
            fs::write(&own, key.serialize_pem()).unwrap();
            let tls_cacert = self.folder.join("ca.pem");
            Options { tls: true, tls_cacert, tls_cert: cert, tls_key: own, ..Options::default() }
        }

        fn revoke(&self, number: u64) -> PathBuf {
            let revoked = RevokedCertParams {
                serial_number: SerialNumber::from(number),
                revocation_time: date_time_ymd(2024, 1, 1),
                reason_code: None,
                invalidity_date: None,
            };
            let list = CertificateRevocationListParams {
                this_update: date_time_ymd(2024, 1, 1),
                next_update: date_time_ymd(2100, 1, 1),
                crl_number: SerialNumber::from(1),
                issuing_distribution_point: None,
                revoked_certs: vec![revoked],
                key_identifier_method: KeyIdMethod::Sha256,
            };
            let path = self.folder.join("crl.pem");
            fs::write(&path, list.signed_by(&self.issuer).unwrap().pem().unwrap()).unwrap();
            path
        }
    }

    impl Drop for Authority {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.folder);
        }
    }

    /// Sends a word over a connection with these options on both ends: what was heard, or what each end says is wrong.
    fn meet(client: &Options, server: &Options) -> Result<Vec<u8>, (String, String)> {
        let (one, other) = sys::socket::socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0).unwrap();
        let on = || Ok(());
        std::thread::scope(|scope| {
            let serving = scope.spawn(move || {
                let securing = Securing::server(server)?.expect("with --tls");
                let mut connection = securing.secure(Box::new(File::from(other)), &on)?;
                let mut heard = vec![0; 5];
                let answered = connection
                    .read_exact(&mut heard)
                    .and_then(|()| connection.write_all(b"yes"))
                    .and_then(|()| connection.flush());
                answered.map_err(|error| refused(&error)).map(|()| heard)
            });
            let said = || {
                let securing = Securing::client(client)?.expect("with --tls");
                let mut connection = securing.secure(Box::new(File::from(one)), &on)?;
                let said = connection.write_all(b"pages").and_then(|()| connection.flush());
                said.and_then(|()| connection.read_exact(&mut [0; 3])).map_err(|error| refused(&error))
            };
            let said = said();
            let heard = serving.join().unwrap();
            match (said, heard) {
                (Ok(()), Ok(heard)) => Ok(heard),
                (said, heard) => {
                    let text =
                        |failure: Option<Failure>| failure.map(|it| it.to_string()).unwrap_or_default();
                    Err((text(said.err()), text(heard.err())))
                }
            }
        })
    }

    fn to(host: &str, options: Options) -> Options {
        Options { address: Some(host.into()), ..options }
    }

    #[test]
    fn ends_that_trust_each_other_speak() {
        let ours = Authority::new("good");
        let (client, server) = (ours.sign(1, "here.example"), ours.sign(2, "there.example"));
        assert_eq!(meet(&to("there.example", client.clone()), &server).unwrap(), b"pages");
        let by_number = ours.sign(3, "10.1.2.3");
        assert_eq!(meet(&to("10.1.2.3", client), &by_number).unwrap(), b"pages");
    }

    #[test]
    fn another_name_is_refused_unless_names_do_not_matter() {
        let ours = Authority::new("name");
        let (client, server) = (ours.sign(1, "here.example"), ours.sign(2, "there.example"));
        let (said, _) = meet(&to("elsewhere.example", client.clone()), &server).unwrap_err();
        assert!(said.contains("--tls-no-cn-verify"), "{said}");
        let any = Options { tls_no_cn_verify: true, ..client.clone() };
        assert_eq!(meet(&to("elsewhere.example", any.clone()), &server).unwrap(), b"pages");
        assert_eq!(meet(&any, &server).unwrap(), b"pages");
        let unknown = Securing::client(&client).unwrap_err().to_string();
        assert!(unknown.contains("--address"), "{unknown}");
    }

    #[test]
    fn an_authority_that_is_not_trusted_is_refused_on_both_sides() {
        let (ours, others) = (Authority::new("ours"), Authority::new("others"));
        let (client, server) = (ours.sign(1, "here.example"), others.sign(2, "there.example"));
        let any =
            |options: &Options| Options { tls_no_cn_verify: true, ..to("there.example", options.clone()) };
        let (said, _) = meet(&any(&client), &server).unwrap_err();
        assert!(said.contains("--tls-cacert"), "{said}");
        // The client trusts this server, but not the other way round.
        let lenient = Options { tls_cacert: server.tls_cacert.clone(), ..client };
        let (_, heard) = meet(&any(&lenient), &server).unwrap_err();
        assert!(heard.contains("--tls-cacert"), "{heard}");
    }

    #[test]
    fn a_certificate_that_was_revoked_is_refused() {
        let ours = Authority::new("revoked");
        let (client, server) = (ours.sign(1, "here.example"), ours.sign(2, "there.example"));
        let list = ours.revoke(2);
        let client = Options { tls_cacrl: list.clone(), ..to("there.example", client) };
        let (said, _) = meet(&client, &server).unwrap_err();
        assert!(said.to_lowercase().contains("revoked"), "{said}");
        let good = ours.sign(3, "there.example");
        assert_eq!(meet(&client, &Options { tls_cacrl: list, ..good }).unwrap(), b"pages");
    }

    #[test]
    fn files_that_are_missing_or_something_else_are_named() {
        let ours = Authority::new("files");
        let good = to("there.example", ours.sign(1, "here.example"));
        let missing = ours.folder.join("none.pem");
        let key = good.tls_key.clone();
        for (options, name) in [
            (Options { tls_cacert: missing.clone(), ..good.clone() }, "none.pem"),
            (Options { tls_cacrl: missing.clone(), ..good.clone() }, "none.pem"),
            (Options { tls_key: missing, ..good.clone() }, "none.pem"),
            (Options { tls_cert: key, ..good.clone() }, "1.key"),
        ] {
            for failure in [Securing::client(&options).unwrap_err(), Securing::server(&options).unwrap_err()]
            {
                assert!(failure.to_string().contains(name), "{failure}");
            }
        }
        let other = ours.sign(2, "there.example");
        let mixed = Options { tls_key: other.tls_key, ..good };
        assert!(Securing::client(&mixed).is_err());
        assert!(Securing::client(&Options::default()).unwrap().is_none());
    }

    #[test]
    fn an_end_without_encryption_is_refused() {
        let ours = Authority::new("plain");
        let server = ours.sign(1, "there.example");
        let (one, other) = sys::socket::socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0).unwrap();
        File::from(one).write_all(&[0; 64]).unwrap();
        let secured =
            Securing::server(&server).unwrap().unwrap().secure(Box::new(File::from(other)), &|| Ok(()));
        assert!(secured.is_err());
    }
}

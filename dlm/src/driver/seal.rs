//! Keys of a connection: HKDF-SHA256 of the cluster key with both nonces and both identities gives one
//! ChaCha20-Poly1305 key per direction. Fresh nonces make every connection's keys new, so frames of another
//! connection, direction, member, life or lock space never open. The counter is the nonce: a frame that is repeated,
//! left out or reordered does not open either.

use cairn_base::Proc;
use chacha20poly1305::aead::{Aead, KeyInit, Payload};
use chacha20poly1305::{ChaCha20Poly1305, Nonce};
use hkdf::Hkdf;
use sha2::Sha256;

pub(super) const TAG: usize = 16;

/// The key material of a lock space.
#[derive(Clone)]
pub(super) struct Secret {
    key: Vec<u8>,
    context: Vec<u8>,
}

impl Secret {
    pub(super) fn new(key: &[u8], cluster: &str, space: &str) -> Self {
        let mut context = b"cairn dlm 1".to_vec();
        for s in [cluster, space] {
            context.extend_from_slice(&(s.len() as u32).to_le_bytes());
            context.extend_from_slice(s.as_bytes());
        }
        Self { key: key.to_vec(), context }
    }

    /// (dialer to listener, listener to dialer).
    pub(super) fn keys(
        &self,
        dialer: Proc,
        listener: Proc,
        nonces: (&[u8; 32], &[u8; 32]),
    ) -> (Sealer, Sealer) {
        let salt = [nonces.0.as_slice(), nonces.1].concat();
        let kdf = Hkdf::<Sha256>::new(Some(&salt), &self.key);
        let mut info = self.context.clone();
        for p in [dialer, listener] {
            info.extend_from_slice(&p.node.0.to_le_bytes());
            info.extend_from_slice(&p.incarnation.0.to_le_bytes());
        }
        let mut okm = [0; 64];
        kdf.expand(&info, &mut okm).expect("64 bytes are within the limit of HKDF");
        let (a, b) = okm.split_at(32);
        (Sealer::new(a), Sealer::new(b))
    }
}

/// One direction of one connection.
pub(super) struct Sealer {
    cipher: ChaCha20Poly1305,
    next: u64,
}

impl Sealer {
    fn new(key: &[u8]) -> Self {
        Self { cipher: ChaCha20Poly1305::new_from_slice(key).expect("32 bytes"), next: 0 }
    }

    fn nonce(&mut self) -> Nonce {
        let mut n = [0; 12];
        n[4..].copy_from_slice(&self.next.to_le_bytes());
        self.next += 1;
        Nonce::from(n)
    }

    /// Appends the frame of `plain`: length, ciphertext, tag.
    pub(super) fn seal(&mut self, plain: &[u8], out: &mut Vec<u8>) {
        let len = ((plain.len() + TAG) as u32).to_le_bytes();
        let n = self.nonce();
        let sealed = self.cipher.encrypt(&n, Payload { msg: plain, aad: &len }).expect("sealing cannot fail");
        out.extend_from_slice(&len);
        out.extend_from_slice(&sealed);
    }

    pub(super) fn open(&mut self, len: [u8; 4], sealed: &[u8]) -> Option<Vec<u8>> {
        let n = self.nonce();
        self.cipher.decrypt(&n, Payload { msg: sealed, aad: &len }).ok()
    }
}

//! A file mapped for reading whose bytes are copied out, never referenced. The only `unsafe` of the store.
//!
//! **A mapped file can shrink, and a disk can fail.** Touching a mapped page that is gone raises SIGBUS, whose default is
//! to kill the process. One handler, installed with the first map, turns that into an error: where the address lies in
//! one of our maps it puts a page of zeros there, marks the map as lost, and returns, so that the load goes on; `copy`
//! sees the mark and answers with an error. Every other SIGBUS goes to the handler that was there before.
//!
//! Asking the kernel to copy instead (`process_vm_readv`, as this file did before) costs a system call and a walk of the
//! page tables per chunk: a tenth to a fifth of the rate of raw patches.
//!
//! **Mapped bytes may change under us**, so no reference to them is ever made: `copy` is one `memcpy` from a raw pointer
//! into the caller's buffer, and only that private copy is checked and used. Nothing between the check and the use can
//! change it.

use std::ffi::c_void;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
use std::sync::{Mutex, Once, OnceLock, PoisonError};

use memmap2::{Advice, Mmap};

use super::StoreError;

/// Maps that the handler knows at once; a process has no more files open than this by far.
const MAX_MAPS: usize = 4096;

/// An address range that the handler may patch; free where `start` is 0.
struct Slot {
    start: AtomicUsize,
    end: AtomicUsize,
    is_lost: AtomicBool,
}

static SLOTS: [Slot; MAX_MAPS] = [const {
    Slot {
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        is_lost: AtomicBool::new(false),
    }
}; MAX_MAPS];
/// Taken by those who claim or free a slot; the handler reads the slots without it.
static CLAIM: Mutex<()> = Mutex::new(());
static INSTALL: Once = Once::new();
/// What SIGBUS did before; written once, before the handler can run.
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();

/// A file mapped for reading.
pub(super) struct MappedFile {
    path: PathBuf,
    map: Mmap,
    slot: &'static Slot,
}

impl MappedFile {
    /// Maps a file of at least `min_bytes` bytes.
    pub(super) fn open(path: &Path, min_bytes: u64) -> Result<Self, StoreError> {
        let file = fs_err::File::open(path)?;
        let bytes = file.metadata()?.len();
        if bytes < min_bytes {
            return Err(StoreError::damaged(
                path,
                format!("{bytes} bytes, at least {min_bytes} expected"),
            ));
        }
        install();
        // SAFETY: the map is read-only and no reference into it is ever made: `copy` reads it through a raw pointer into
        // a private buffer. So a change of the file by another process breaks no rule of Rust's references, and the
        // handler answers where its pages are gone.
        let map = unsafe { Mmap::map(file.file()) }.map_err(|error| {
            StoreError::Io(std::io::Error::new(
                error.kind(),
                format!("{}: cannot map: {error}", path.display()),
            ))
        })?;
        let start = map.as_ptr() as usize;
        let slot = claim(start, start + map.len()).ok_or_else(|| {
            StoreError::Io(std::io::Error::other(format!(
                "{}: more than {MAX_MAPS} store files are open",
                path.display()
            )))
        })?;
        Ok(Self {
            path: path.into(),
            map,
            slot,
        })
    }

    /// Returns the file's path.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the bytes that were there when the file was mapped.
    pub(super) fn len(&self) -> u64 {
        self.map.len() as u64
    }

    /// Copies as many bytes as `into` holds from `offset`; an error where the file has lost them since it was mapped.
    pub(super) fn copy(&self, offset: u64, into: &mut [u8]) -> Result<(), StoreError> {
        let end = offset.checked_add(into.len() as u64);
        if end.is_none_or(|end| end > self.len()) {
            return Err(self.cut(offset, into.len()));
        }
        // SAFETY: the range lies in the map, as was just checked, and `into` is exclusive and elsewhere. Pages that are
        // gone are replaced by the handler.
        unsafe {
            std::ptr::copy_nonoverlapping(self.map.as_ptr().add(offset as usize), into.as_mut_ptr(), into.len());
        }
        // Without the fence the compiler may look at the mark before it copies. It also orders this thread's copy of zeros
        // behind the mark that another thread set before it put them there.
        fence(Ordering::SeqCst);
        if self.slot.is_lost.load(Ordering::Relaxed) {
            return Err(self.cut(offset, into.len()));
        }
        Ok(())
    }

    /// Tells the kernel that a range is read soon, so that a cold file is read ahead while other bytes are decoded.
    pub(super) fn will_need(&self, offset: u64, length: usize) {
        // Advice only: where the kernel refuses it, the pages come when they are touched.
        drop(self.map.advise_range(Advice::WillNeed, offset as usize, length));
    }

    fn cut(&self, offset: u64, length: usize) -> StoreError {
        let now = std::fs::metadata(&self.path).map_or(0, |metadata| metadata.len());
        StoreError::damaged(
            &self.path,
            format!(
                "{length} bytes at {offset} cannot be read, its end is now at {now}: truncated while open, or a disk error"
            ),
        )
    }
}

impl Drop for MappedFile {
    fn drop(&mut self) {
        // Freed before the address range is: nobody reads this map any more, and the next map may lie there.
        self.slot.start.store(0, Ordering::SeqCst);
    }
}

/// Takes a free slot for a range.
fn claim(start: usize, end: usize) -> Option<&'static Slot> {
    let _guard = CLAIM.lock().unwrap_or_else(PoisonError::into_inner);
    let slot = SLOTS.iter().find(|slot| slot.start.load(Ordering::SeqCst) == 0)?;
    slot.is_lost.store(false, Ordering::SeqCst);
    slot.end.store(end, Ordering::SeqCst);
    slot.start.store(start, Ordering::SeqCst);
    Some(slot)
}

fn install() {
    INSTALL.call_once(|| {
        // SAFETY: `sigaction` is plain data for which zeros are a valid value, and both calls get pointers to whole ones.
        // The handler is async-signal-safe: it touches atomics, a once-written static, and makes system calls.
        unsafe {
            let mut before: libc::sigaction = std::mem::zeroed();
            if libc::sigaction(libc::SIGBUS, std::ptr::null(), &mut before) != 0 {
                return;
            }
            // Kept before ours is installed, so that the handler never runs without it.
            PREVIOUS.get_or_init(|| before);
            let mut ours: libc::sigaction = std::mem::zeroed();
            ours.sa_sigaction = on_sigbus as *const () as usize;
            ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
            libc::sigemptyset(&mut ours.sa_mask);
            libc::sigaction(libc::SIGBUS, &ours, std::ptr::null_mut());
        }
    });
}

/// Puts a page of zeros where one of our maps has lost one; hands every other SIGBUS on.
extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes a valid `siginfo_t` to a handler that was installed with SA_SIGINFO.
    let address = unsafe { (*info).si_addr() } as usize;
    let ours = SLOTS.iter().find(|slot| {
        let start = slot.start.load(Ordering::SeqCst);
        start != 0 && (start..slot.end.load(Ordering::SeqCst)).contains(&address)
    });
    if let Some(slot) = ours {
        // Marked first: whoever reads zeros from this page sees the mark.
        slot.is_lost.store(true, Ordering::SeqCst);
        if replace_page(address) {
            return;
        }
    }
    hand_on(signal, info, context);
}

/// Maps zeros over the page of an address; true where that worked.
fn replace_page(address: usize) -> bool {
    // SAFETY: `sysconf` has no preconditions. The page lies in a map of ours, of which no reference exists, so that
    // replacing it by anonymous memory of the same protection changes nothing that Rust relies on.
    unsafe {
        let page = libc::sysconf(libc::_SC_PAGESIZE) as usize;
        let at = libc::mmap(
            (address & !(page - 1)) as *mut c_void,
            page,
            libc::PROT_READ,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
            -1,
            0,
        );
        at != libc::MAP_FAILED
    }
}

/// Does what SIGBUS did before.
fn hand_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    let before = PREVIOUS.get();
    // SAFETY: the pointers are those of the kernel, and the previous handler is called as it was registered. Without one
    // the default comes back and the load is repeated, which ends the process as it should.
    unsafe {
        match before {
            Some(before) if ![libc::SIG_DFL, libc::SIG_IGN].contains(&before.sa_sigaction) => {
                if before.sa_flags & libc::SA_SIGINFO != 0 {
                    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut c_void) =
                        std::mem::transmute(before.sa_sigaction);
                    handler(signal, info, context);
                } else {
                    let handler: extern "C" fn(libc::c_int) = std::mem::transmute(before.sa_sigaction);
                    handler(signal);
                }
            }
            _ => {
                let mut default: libc::sigaction = std::mem::zeroed();
                default.sa_sigaction = libc::SIG_DFL;
                libc::sigaction(signal, &default, std::ptr::null_mut());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_is_gone_is_an_error_and_not_a_signal() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("case");
        std::fs::write(&path, vec![7; 5 * 4096]).unwrap();
        let mapped = MappedFile::open(&path, 1).unwrap();
        let mut bytes = [0; 3];
        mapped.copy(9000, &mut bytes).unwrap();
        assert_eq!(bytes, [7; 3]);
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(4096).unwrap();
        // What is left can no longer be told from what is lost: the whole map counts as lost after the first fault.
        mapped.copy(0, &mut bytes).unwrap();
        let mut across = vec![0; 8000];
        let error = mapped.copy(4000, &mut across).unwrap_err().to_string();
        assert!(
            error.contains("case") && error.contains("truncated while open"),
            "{error}"
        );
        assert!(across[..96].iter().all(|byte| *byte == 7) && across[96..].iter().all(|byte| *byte == 0));
        assert!(mapped.copy(0, &mut bytes).is_err());
        // Another map of the same file is not concerned, also where it takes the same slot.
        drop(mapped);
        let again = MappedFile::open(&path, 1).unwrap();
        again.copy(0, &mut bytes).unwrap();
        assert!(again.copy(4090, &mut across).is_err());
    }

    #[test]
    fn many_threads_may_lose_one_file_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("case");
        std::fs::write(&path, vec![9; 64 * 4096]).unwrap();
        let mapped = MappedFile::open(&path, 1).unwrap();
        std::fs::OpenOptions::new()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(0)
            .unwrap();
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let mapped = &mapped;
                scope.spawn(move || {
                    let mut bytes = vec![0; 4096 * 32];
                    let outcome = mapped.copy(thread * 4096, &mut bytes);
                    // Bytes that nobody reads need not be copied, and then nothing is missed.
                    std::hint::black_box(&bytes);
                    assert!(outcome.is_err());
                });
            }
        });
    }
}

//! A blob on its way from the network to the disk: a file without a name that grows at one end while it is read at the other.
//!
//! So several layers download at once while they are unpacked in their order. The reader sees the end only after the writer has
//! called [`SpoolWriter::finish`], that is after size and digest were found right; a writer dropped before that ends the
//! reader with an error, and the file's space is free again once both are gone.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use tokio::io::AsyncWriteExt;

/// How far the writer is.
#[derive(Clone, Copy, Default)]
struct State {
    written: u64,
    finished: bool,
    abandoned: bool,
}

/// Held by both ends.
#[derive(Default)]
struct Progress {
    state: Mutex<State>,
    changed: Condvar,
}

impl Progress {
    fn update(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }
}

/// The network's end.
pub(crate) struct SpoolWriter {
    file: tokio::fs::File,
    progress: Arc<Progress>,
}

/// The unpacker's end. Blocks.
pub(crate) struct SpoolReader {
    file: File,
    at: u64,
    progress: Arc<Progress>,
}

/// What a reader gets when the writer has gone before the end.
#[derive(Debug, thiserror::Error)]
#[error("the download ended early")]
pub(crate) struct Abandoned;

/// Both ends of an empty file that no name leads to.
pub(crate) fn spool(file: File) -> io::Result<(SpoolWriter, SpoolReader)> {
    let progress = Arc::<Progress>::default();
    let reader = SpoolReader { file: file.try_clone()?, at: 0, progress: Arc::clone(&progress) };
    Ok((SpoolWriter { file: tokio::fs::File::from_std(file), progress }, reader))
}

impl SpoolWriter {
    /// Returns once the reader can see the bytes.
    pub(crate) async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes).await?;
        self.file.flush().await?;
        let len = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        self.progress.update(|state| state.written = state.written.saturating_add(len));
        Ok(())
    }

    /// The blob is complete and right.
    pub(crate) fn finish(self) {
        self.progress.update(|state| state.finished = true);
    }
}

impl Drop for SpoolWriter {
    fn drop(&mut self) {
        self.progress.update(|state| state.abandoned = true);
    }
}

impl Read for SpoolReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let mut state = self.progress.state.lock().unwrap_or_else(PoisonError::into_inner);
        while self.at == state.written && !state.finished && !state.abandoned {
            state = self.progress.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let (ready, finished) = (state.written.saturating_sub(self.at), state.finished);
        drop(state);
        if ready == 0 {
            return if finished { Ok(0) } else { Err(io::Error::other(Abandoned)) };
        }
        let room = usize::try_from(ready).unwrap_or(usize::MAX).min(buf.len());
        let read = self.file.read_at(buf.get_mut(..room).unwrap_or_default(), self.at)?;
        self.at = self.at.saturating_add(u64::try_from(read).unwrap_or(u64::MAX));
        Ok(read)
    }
}

/// Whether an error says that the writer has gone.
pub(crate) fn is_abandoned(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|source| source.is::<Abandoned>())
}

//! The file tree of an image, merged from its layers in memory.
//!
//! Owns names and metadata and the OCI rules for laying one layer over another (OCI image-spec, layer.md). File contents are
//! elsewhere: a file is the place of its bytes. Nothing of an archive's names ever reaches the host's file system, so there
//! is nothing to escape from: `..` is refused, and symbolic links are followed inside the tree.

use std::collections::BTreeMap;

/// Most files, directories and links that the layers of an image may create together.
pub(crate) const MAX_NODES: usize = 2 << 20;
/// Most bytes of names, link targets and extended attributes together.
pub(crate) const MAX_METADATA: usize = 512 << 20;
/// Linux's PATH_MAX: a path in an archive is shorter.
pub(crate) const MAX_PATH: usize = 4096;
/// Longest name of a directory entry (NAME_MAX).
pub(crate) const MAX_NAME: usize = 255;
/// Most symbolic links followed in one path, as Linux has it (path_resolution(7)).
const MAX_SYMLINKS: usize = 40;
/// What a directory costs beyond its name, so that names alone cannot be had for nothing.
const NODE_COST: usize = 64;
/// Whiteouts begin with this (OCI image-spec layer.md, "Whiteouts").
const WHITEOUT: &[u8] = b".wh.";
/// In a directory: hides all that lower layers have there.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Other names of this kind belong to AUFS and mean nothing here.
const WHITEOUT_META: &[u8] = b".wh..wh.";

/// What can be wrong with the names of an archive.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `..` in a path.
    #[error("the path {0} holds .., which no image builder writes; build the image anew")]
    DotDot(String),
    /// A path longer than [`MAX_PATH`], or a name in it longer than [`MAX_NAME`].
    #[error("the path {0}… is longer than Linux allows ({MAX_PATH} bytes, {MAX_NAME} per name)")]
    TooLong(String),
    /// A NUL in a path.
    #[error("the path {0} holds a NUL byte")]
    Nul(String),
    /// A whiteout of nothing, of `.` or of `..`.
    #[error("the whiteout {0} names no file")]
    Whiteout(String),
    /// Something below a file that is no directory.
    #[error("the path {0} leads through something that is no directory")]
    NotDirectory(String),
    /// Symbolic links in a circle.
    #[error("the path {0} leads through more than {MAX_SYMLINKS} symbolic links")]
    Loop(String),
    /// A hard link to nothing, or to a directory.
    #[error("{0} is a hard link to {1}, which is no file of the image")]
    Link(String, String),
    /// The root replaced by something else.
    #[error("the image's root is not a directory")]
    Root,
    /// More than [`MAX_NODES`].
    #[error("the image has more than {MAX_NODES} files")]
    TooMany,
    /// More than [`MAX_METADATA`].
    #[error("names and extended attributes of the image take more than {} MiB", MAX_METADATA >> 20)]
    TooMuch,
}

/// Names a node of its tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct NodeId(usize);

impl NodeId {
    /// Below [`Tree::len`] of its tree, for tables that go with it.
    pub(crate) fn index(self) -> usize {
        self.0
    }
}

/// The root of every tree.
pub(crate) const ROOT: NodeId = NodeId(0);

/// What inode(7) calls attributes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Attributes {
    /// Permission bits, set-user-ID and the like included (07777).
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds since 1970, and nanoseconds.
    pub(crate) mtime: (i64, u32),
    /// Full names to values.
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// Where the bytes of a regular file are: whole blocks of the output one after the other, and what is left over.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct FileData {
    pub(crate) size: u64,
    /// First block; meaningless if there is no whole block.
    pub(crate) block: u32,
    /// The last `size % block size` bytes if they are to lie beside the inode; else they are in a block of their own.
    pub(crate) tail: Vec<u8>,
}

/// What a node is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    Directory(BTreeMap<Vec<u8>, NodeId>),
    File(FileData),
    Symlink(Vec<u8>),
    /// Major and minor number.
    CharDevice(u32, u32),
    BlockDevice(u32, u32),
    Fifo,
}

/// A file of any kind.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) attributes: Attributes,
    pub(crate) content: Content,
    /// The last layer that had something at this place or below it.
    layer: u32,
}

/// See the module.
pub(crate) struct Tree {
    nodes: Vec<Node>,
    layer: u32,
    metadata: usize,
}

impl Tree {
    /// An empty root directory.
    pub(crate) fn new() -> Self {
        Self {
            nodes: vec![Node { attributes: implied(), content: Content::Directory(BTreeMap::new()), layer: 0 }],
            layer: 0,
            metadata: 0,
        }
    }

    /// What is added from here on lies over what is there.
    pub(crate) fn begin_layer(&mut self) {
        self.layer = self.layer.saturating_add(1);
    }

    /// All nodes ever made, those no longer reached included.
    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// A node by its id.
    pub(crate) fn node(&self, id: NodeId) -> &Node {
        #[expect(clippy::indexing_slicing, reason = "ids are made by this tree alone, which never shrinks")]
        &self.nodes[id.0]
    }

    fn node_mut(&mut self, id: NodeId) -> &mut Node {
        #[expect(clippy::indexing_slicing, reason = "ids are made by this tree alone, which never shrinks")]
        &mut self.nodes[id.0]
    }

    /// The names in a directory; nothing for all else.
    pub(crate) fn children(&self, id: NodeId) -> Option<&BTreeMap<Vec<u8>, NodeId>> {
        match &self.node(id).content {
            Content::Directory(names) => Some(names),
            _ => None,
        }
    }

    /// Puts an entry of the current layer at `path`; whiteouts take effect here. A directory over a directory keeps what is in it.
    pub(crate) fn place(&mut self, path: &[u8], attributes: Attributes, content: Content) -> Result<(), Error> {
        let mut names = components(path)?;
        let Some(name) = names.pop() else {
            return self.set_root(attributes, &content);
        };
        if name.starts_with(WHITEOUT) {
            return self.whiteout(path, &names, &name);
        }
        let parent = self.walk(path, names, true)?.ok_or_else(|| Error::NotDirectory(text(path)))?;
        let existing = self.children(parent).and_then(|names| names.get(&name)).copied();
        if let (Some(id), Content::Directory(_)) = (existing, &content)
            && let Content::Directory(_) = self.node(id).content
        {
            self.charge(xattr_bytes(&attributes))?;
            let layer = self.layer;
            let node = self.node_mut(id);
            node.attributes = attributes;
            node.layer = layer;
            return Ok(());
        }
        let id = self.add(attributes, content)?;
        self.enter(parent, name, id)
    }

    /// Another name for the file at `target`.
    pub(crate) fn link(&mut self, path: &[u8], target: &[u8]) -> Result<(), Error> {
        let no_target = || Error::Link(text(path), text(target));
        let mut names = components(target)?;
        let name = names.pop().ok_or_else(no_target)?;
        let parent = self.walk(target, names, false)?.ok_or_else(no_target)?;
        let id = self.children(parent).and_then(|names| names.get(&name)).copied().ok_or_else(no_target)?;
        if let Content::Directory(_) = self.node(id).content {
            return Err(no_target());
        }
        let mut names = components(path)?;
        let name = names.pop().ok_or(Error::Root)?;
        let parent = self.walk(path, names, true)?.ok_or_else(|| Error::NotDirectory(text(path)))?;
        let layer = self.layer;
        self.node_mut(id).layer = layer;
        self.enter(parent, name, id)
    }

    fn set_root(&mut self, attributes: Attributes, content: &Content) -> Result<(), Error> {
        let Content::Directory(_) = content else { return Err(Error::Root) };
        self.charge(xattr_bytes(&attributes))?;
        self.node_mut(ROOT).attributes = attributes;
        Ok(())
    }

    fn enter(&mut self, parent: NodeId, name: Vec<u8>, id: NodeId) -> Result<(), Error> {
        self.charge(name.len().saturating_add(NODE_COST))?;
        if let Content::Directory(names) = &mut self.node_mut(parent).content {
            names.insert(name, id);
        }
        Ok(())
    }

    fn add(&mut self, attributes: Attributes, content: Content) -> Result<NodeId, Error> {
        if self.nodes.len() >= MAX_NODES {
            return Err(Error::TooMany);
        }
        let own = match &content {
            Content::Symlink(target) => target.len(),
            Content::File(data) => data.tail.len(),
            _ => 0,
        };
        self.charge(own.saturating_add(xattr_bytes(&attributes)))?;
        let id = NodeId(self.nodes.len());
        self.nodes.push(Node { attributes, content, layer: self.layer });
        Ok(id)
    }

    fn charge(&mut self, bytes: usize) -> Result<(), Error> {
        self.metadata = self.metadata.saturating_add(bytes);
        if self.metadata > MAX_METADATA { Err(Error::TooMuch) } else { Ok(()) }
    }

    /// Follows directories and symbolic links from the root, as chroot(2) would. With `create`, makes what is missing and marks
    /// the way as touched by this layer; without, `None` means that there is no such directory.
    fn walk(&mut self, path: &[u8], names: Vec<Vec<u8>>, create: bool) -> Result<Option<NodeId>, Error> {
        let mut way = vec![];
        let mut todo = names;
        todo.reverse();
        let mut links = 0_usize;
        while let Some(name) = todo.pop() {
            let here = way.last().copied().unwrap_or(ROOT);
            match name.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    way.pop();
                    continue;
                }
                _ => {}
            }
            let found = self.children(here).and_then(|names| names.get(&name)).copied();
            let next = match found {
                Some(next) => next,
                None if !create => return Ok(None),
                None => {
                    let next = self.add(implied(), Content::Directory(BTreeMap::new()))?;
                    self.enter(here, name, next)?;
                    next
                }
            };
            match &self.node(next).content {
                Content::Directory(_) => way.push(next),
                Content::Symlink(target) => {
                    links = links.saturating_add(1);
                    if links > MAX_SYMLINKS {
                        return Err(Error::Loop(text(path)));
                    }
                    if target.starts_with(b"/") {
                        way.clear();
                    }
                    todo.extend(target.split(|&b| b == b'/').rev().map(<[u8]>::to_vec));
                }
                _ if create => return Err(Error::NotDirectory(text(path))),
                _ => return Ok(None),
            }
        }
        if create {
            let layer = self.layer;
            for &id in &way {
                self.node_mut(id).layer = layer;
            }
        }
        Ok(Some(way.last().copied().unwrap_or(ROOT)))
    }

    /// Takes away what lower layers have; what this layer brought stays, wherever in the archive it came (layer.md, "Whiteouts").
    fn whiteout(&mut self, path: &[u8], parent: &[Vec<u8>], name: &[u8]) -> Result<(), Error> {
        let parent = self.walk(path, parent.to_vec(), false)?;
        if name == OPAQUE {
            if let Some(parent) = parent {
                self.prune(parent);
            }
            return Ok(());
        }
        if name.starts_with(WHITEOUT_META) {
            return Ok(());
        }
        let hidden = name.strip_prefix(WHITEOUT).unwrap_or_default();
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(Error::Whiteout(text(path)));
        }
        let Some(parent) = parent else { return Ok(()) };
        let Some(&id) = self.children(parent).and_then(|names| names.get(hidden)) else { return Ok(()) };
        if self.node(id).layer < self.layer {
            if let Content::Directory(names) = &mut self.node_mut(parent).content {
                names.remove(hidden);
            }
        } else {
            self.prune(id);
        }
        Ok(())
    }

    /// Takes all that only lower layers have out of a directory.
    fn prune(&mut self, directory: NodeId) {
        let mut todo = vec![directory];
        while let Some(id) = todo.pop() {
            let layer = self.layer;
            let Content::Directory(names) = &mut self.node_mut(id).content else { continue };
            let old = std::mem::take(names);
            let kept: BTreeMap<_, _> = old.into_iter().filter(|(_, child)| self.node(*child).layer >= layer).collect();
            todo.extend(kept.values());
            self.node_mut(id).content = Content::Directory(kept);
        }
    }
}

/// A directory that a path implies but no layer has.
fn implied() -> Attributes {
    Attributes { mode: 0o755, ..Attributes::default() }
}

fn xattr_bytes(attributes: &Attributes) -> usize {
    attributes.xattrs.iter().fold(0, |sum, (name, value)| sum.saturating_add(name.len()).saturating_add(value.len()))
}

/// The names in a path of an archive, relative to the root whether it begins with `/` or not.
fn components(path: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
    if path.len() >= MAX_PATH {
        return Err(Error::TooLong(text(path)));
    }
    let mut names = vec![];
    for name in path.split(|&b| b == b'/') {
        match name {
            b"" | b"." => continue,
            b".." => return Err(Error::DotDot(text(path))),
            _ if name.len() > MAX_NAME => return Err(Error::TooLong(text(path))),
            _ if name.contains(&0) => return Err(Error::Nul(text(path))),
            _ => names.push(name.to_vec()),
        }
    }
    Ok(names)
}

/// A path for a message: cut, and without control characters.
pub(crate) fn text(path: &[u8]) -> String {
    const SHOWN: usize = 120;
    path.get(..SHOWN).unwrap_or(path).escape_ascii().to_string()
}

#[cfg(test)]
mod tests;

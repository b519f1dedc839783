//! Header blocks: name/value pairs, compressed by one zlib stream per direction and connection (SPDY/3 §2.6.10).
//!
//! Both streams start from the same dictionary. A peer's block is inflated into a limited buffer and then taken apart;
//! whatever it holds, the worst is an error.

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

use super::Error;

/// Longest block in bytes, inflated. Ours have a few short headers.
const BLOCK_BYTES: usize = 16 << 10;

/// Most headers in a block.
const BLOCK_HEADERS: u32 = 64;

/// Words that begin the dictionary, each after its length as a 32-bit number.
const WORDS: [&str; 65] = [
    "options",
    "head",
    "post",
    "put",
    "delete",
    "trace",
    "accept",
    "accept-charset",
    "accept-encoding",
    "accept-language",
    "accept-ranges",
    "age",
    "allow",
    "authorization",
    "cache-control",
    "connection",
    "content-base",
    "content-encoding",
    "content-language",
    "content-length",
    "content-location",
    "content-md5",
    "content-range",
    "content-type",
    "date",
    "etag",
    "expect",
    "expires",
    "from",
    "host",
    "if-match",
    "if-modified-since",
    "if-none-match",
    "if-range",
    "if-unmodified-since",
    "last-modified",
    "location",
    "max-forwards",
    "pragma",
    "proxy-authenticate",
    "proxy-authorization",
    "range",
    "referer",
    "retry-after",
    "server",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "user-agent",
    "vary",
    "via",
    "warning",
    "www-authenticate",
    "method",
    "get",
    "status",
    "200 OK",
    "version",
    "HTTP/1.1",
    "url",
    "public",
    "set-cookie",
    "keep-alive",
    "origin",
];

/// The rest of the dictionary, as it is.
const PHRASES: &str = "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505\
    203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidden\
    404 Not Found500 Internal Server Error501 Not Implemented503 Service Unavailable\
    Jan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMT\
    chunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,text/javascript,\
    publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0.";

/// Names in lower case, and values.
pub(crate) type Headers = Vec<(String, String)>;

/// The value of a header.
pub(crate) fn value<'h>(headers: &'h Headers, name: &str) -> Option<&'h str> {
    headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
}

fn dictionary() -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in WORDS {
        bytes.extend_from_slice(&length(word.len()).to_be_bytes());
        bytes.extend_from_slice(word.as_bytes());
    }
    bytes.extend_from_slice(PHRASES.as_bytes());
    bytes
}

fn length(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

/// Reads the peer's blocks, every one of them in the order in which they come.
#[derive(Debug)]
pub(super) struct Inflater(Decompress);

impl Inflater {
    pub(super) fn new() -> Self {
        Self(Decompress::new(true))
    }

    pub(super) fn read(&mut self, block: &[u8]) -> Result<Headers, Error> {
        parse(&self.inflate(block)?).ok_or(Error::Headers)
    }

    fn inflate(&mut self, block: &[u8]) -> Result<Vec<u8>, Error> {
        let mut plain = Vec::with_capacity(BLOCK_BYTES);
        let mut rest = block;
        loop {
            let (before, had) = (self.0.total_in(), plain.len());
            match self.0.decompress_vec(rest, &mut plain, FlushDecompress::Sync) {
                Ok(Status::Ok | Status::BufError) => {}
                Ok(Status::StreamEnd) => return Err(Error::Headers),
                Err(error) if error.needs_dictionary().is_some() => {
                    self.0.set_dictionary(&dictionary()).map_err(|_| Error::Headers)?;
                }
                Err(_) => return Err(Error::Headers),
            }
            let read = usize::try_from(self.0.total_in().saturating_sub(before)).map_err(|_| Error::Headers)?;
            rest = rest.get(read..).unwrap_or_default();
            if plain.len() == plain.capacity() {
                return Err(Error::Headers);
            }
            if rest.is_empty() {
                return Ok(plain);
            }
            if read == 0 && plain.len() == had {
                return Err(Error::Headers);
            }
        }
    }
}

fn parse(mut bytes: &[u8]) -> Option<Headers> {
    let count = take_word(&mut bytes)?;
    if count > BLOCK_HEADERS {
        return None;
    }
    let mut headers = Headers::new();
    for _ in 0..count {
        headers.push((take_text(&mut bytes)?.to_ascii_lowercase(), take_text(&mut bytes)?));
    }
    Some(headers)
}

fn take_word(bytes: &mut &[u8]) -> Option<u32> {
    let (word, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(u32::from_be_bytes(*word))
}

fn take_text(bytes: &mut &[u8]) -> Option<String> {
    let length = usize::try_from(take_word(bytes)?).ok()?;
    let (text, rest) = bytes.split_at_checked(length)?;
    *bytes = rest;
    String::from_utf8(text.to_vec()).ok()
}

/// Writes our blocks.
#[derive(Debug)]
pub(super) struct Deflater(Compress);

impl Deflater {
    pub(super) fn new() -> Result<Self, Error> {
        let mut zlib = Compress::new(Compression::fast(), true);
        zlib.set_dictionary(&dictionary()).map_err(|_| Error::Headers)?;
        Ok(Self(zlib))
    }

    pub(super) fn write(&mut self, headers: &Headers) -> Result<Vec<u8>, Error> {
        let mut plain = length(headers.len()).to_be_bytes().to_vec();
        for text in headers.iter().flat_map(|(name, value)| [name, value]) {
            plain.extend_from_slice(&length(text.len()).to_be_bytes());
            plain.extend_from_slice(text.as_bytes());
        }
        let mut packed = Vec::with_capacity(plain.len().saturating_add(BLOCK_BYTES));
        match self.0.compress_vec(&plain, &mut packed, FlushCompress::Sync) {
            Ok(Status::Ok) => Ok(packed),
            _ => Err(Error::Headers),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> Headers {
        pairs.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    #[test]
    fn the_dictionary_is_the_specifications() {
        let bytes = dictionary();
        let sum = bytes.iter().fold((1_u32, 0_u32), |(a, b), byte| {
            let a = (a + u32::from(*byte)) % 65521;
            (a, (b + a) % 65521)
        });
        // The Adler-32 that every SPDY/3 stream begins with.
        assert_eq!((bytes.len(), sum.1 << 16 | sum.0), (1423, 0xe3c6_a7c2));
    }

    #[test]
    fn blocks_come_back_in_their_order() {
        let (mut to, mut from) = (Deflater::new().expect("zlib"), Inflater::new());
        for block in
            [headers(&[("streamtype", "stdin")]), headers(&[]), headers(&[("port", "80"), ("streamtype", "data")])]
        {
            let packed = to.write(&block).expect("writes");
            assert_eq!(from.read(&packed).expect("reads"), block);
        }
    }

    #[test]
    fn a_bomb_is_an_error() {
        let (mut to, mut from) = (Deflater::new().expect("zlib"), Inflater::new());
        let bomb = "x".repeat(BLOCK_BYTES + 1);
        let packed = to.write(&headers(&[("a", &bomb)])).expect("writes");
        assert!(packed.len() < BLOCK_BYTES / 8 && from.read(&packed).is_err());
    }

    #[test]
    fn what_does_not_parse_is_an_error() {
        for bytes in [&[][..], &[0, 0, 0], &[0, 0, 0, 1], &[0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff], &[0xff; 8]] {
            assert_eq!(parse(bytes), None, "{bytes:?}");
        }
    }
}

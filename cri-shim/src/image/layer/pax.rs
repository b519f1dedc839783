//! Numbers and extended headers of tar archives.

use super::Error;

/// Prefix of extended attributes in PAX records, as star began it and all others do it.
const XATTR: &[u8] = b"SCHILY.xattr.";
const NANOS_DIGITS: usize = 9;

/// The records of one PAX header, in their order.
#[derive(Default)]
pub(super) struct Records(Vec<(Vec<u8>, Vec<u8>)>);

impl Records {
    /// Splits `LENGTH KEY=VALUE\n`…; values hold any byte, newlines among them.
    pub(super) fn parse(mut bytes: &[u8]) -> Result<Self, Error> {
        let mut records = vec![];
        while !bytes.is_empty() {
            let (record, rest) =
                split_record(bytes).ok_or_else(|| Error::Header("a bad PAX record", super::text(bytes)))?;
            bytes = rest;
            records.push(record);
        }
        Ok(Self(records))
    }

    /// The last value of a key, which is the one that counts.
    pub(super) fn get(&self, key: &str) -> Option<&[u8]> {
        self.all(key).last()
    }

    /// All values of a key.
    pub(super) fn all(&self, key: &str) -> impl Iterator<Item = &[u8]> {
        self.0.iter().filter(move |(k, _)| k.as_slice() == key.as_bytes()).map(|(_, value)| value.as_slice())
    }

    /// All records.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.0.iter().map(|(key, value)| (key.as_slice(), value.as_slice()))
    }

    /// The entry's name; a sparse file has it in a record of its own.
    pub(super) fn path(&self) -> Option<Vec<u8>> {
        self.get("GNU.sparse.name").or_else(|| self.get("path")).map(<[u8]>::to_vec)
    }

    /// Bytes of the entry in the archive.
    pub(super) fn size(&self) -> Option<i64> {
        self.get("size").and_then(decimal)
    }

    pub(super) fn xattrs(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.iter().filter_map(|(key, value)| Some((key.strip_prefix(XATTR)?, value)))
    }
}

/// A key and its value.
type Record = (Vec<u8>, Vec<u8>);

fn split_record(bytes: &[u8]) -> Option<(Record, &[u8])> {
    let space = bytes.iter().position(|&byte| byte == b' ')?;
    let (length, _) = bytes.split_at_checked(space)?;
    let length = usize::try_from(decimal(length)?).ok()?;
    let (record, rest) = bytes.split_at_checked(length)?;
    let record = record.get(space.checked_add(1)?..)?.strip_suffix(b"\n")?;
    let equals = record.iter().position(|&byte| byte == b'=')?;
    let (key, value) = record.split_at_checked(equals)?;
    Some(((key.to_vec(), value.get(1..)?.to_vec()), rest))
}

/// A header's number: octal digits, or with the top bit of the first byte set the rest as a two's complement binary (GNU).
pub(super) fn number(field: &[u8]) -> Option<i64> {
    const BINARY: u8 = 0x80;
    const SIGN: u8 = 0x40;
    let first = *field.first()?;
    if first & BINARY != 0 {
        let start = if first & SIGN != 0 { -1_i64 } else { 0 };
        let first = if first & SIGN != 0 { first } else { first & !BINARY };
        let mut bytes = std::iter::once(first).chain(field.iter().skip(1).copied());
        return bytes.try_fold(start, |sum, byte| sum.checked_mul(256)?.checked_add(i64::from(byte)));
    }
    let digits = field.split(|&byte| byte == 0).next()?.trim_ascii();
    digits.iter().try_fold(0_i64, |sum, &digit| match digit {
        b'0'..=b'7' => sum.checked_mul(8)?.checked_add(i64::from(digit.checked_sub(b'0')?)),
        _ => None,
    })
}

/// A whole decimal number, nothing around it.
pub(super) fn decimal(text: &[u8]) -> Option<i64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// A PAX time: decimal seconds since 1970, possibly with a fraction, possibly negative.
pub(super) fn time(text: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(text).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let digits = fraction.get(..NANOS_DIGITS).unwrap_or(fraction);
    let nanos: u32 = format!("{digits:0<NANOS_DIGITS$}").parse().ok()?;
    if whole.starts_with('-') && nanos > 0 {
        return Some((seconds.checked_sub(1)?, 1_000_000_000_u32.checked_sub(nanos)?));
    }
    Some((seconds, nanos))
}

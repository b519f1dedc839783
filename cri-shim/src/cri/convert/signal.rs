//! Signals by name and number: images and the CRI name them, the core counts them (signal(7)).

use std::str::FromStr;

use nix::sys::signal::Signal as Known;

use crate::cri::proto::Signal;

/// First and last real-time signal that programs may use.
const RTMIN: i32 = 34;
const RTMAX: i32 = 64;

/// The number of `SIGTERM`, `TERM`, `15`, `SIGRTMIN+3` or, in the CRI's spelling, `SIGRTMINPLUS3`.
pub(super) fn number(name: &str) -> Option<i32> {
    let name = name.to_ascii_uppercase();
    if let Ok(number) = name.parse::<i32>() {
        return (1..=RTMAX).contains(&number).then_some(number);
    }
    let name = name.strip_prefix("SIG").unwrap_or(&name).replace("PLUS", "+").replace("MINUS", "-");
    let real_time = |base: i32, offset: &str| match offset {
        "" => Some(base),
        offset => offset.parse().ok().and_then(|offset: i32| base.checked_add(offset)),
    };
    let number = if let Some(offset) = name.strip_prefix("RTMIN") {
        real_time(RTMIN, offset)?
    } else if let Some(offset) = name.strip_prefix("RTMAX") {
        real_time(RTMAX, offset)?
    } else {
        return match name.as_str() {
            "CLD" => Some(libc::SIGCHLD),
            "IOT" => Some(libc::SIGABRT),
            "POLL" => Some(libc::SIGIO),
            name => Known::from_str(&format!("SIG{name}")).ok().map(|signal| signal as i32),
        };
    };
    (RTMIN..=RTMAX).contains(&number).then_some(number)
}

/// The CRI's name of a number.
pub(super) fn wire(number: i32) -> Signal {
    let mut all = (1..).map_while(|value| Signal::try_from(value).ok());
    all.find(|signal| self::number(signal.as_str_name()) == Some(number)).unwrap_or(Signal::RuntimeDefault)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings() {
        for (name, expected) in [
            ("SIGTERM", Some(15)),
            ("quit", Some(3)),
            ("9", Some(9)),
            ("SIGRTMIN+3", Some(37)),
            ("SIGRTMINPLUS3", Some(37)),
            ("SIGRTMAXMINUS14", Some(50)),
            ("RTMAX", Some(64)),
            ("SIGCLD", Some(17)),
            ("SIGRTMIN+31", None),
            ("0", None),
            ("65", None),
            ("SIGNOTHING", None),
            ("", None),
        ] {
            assert_eq!(number(name), expected, "{name}");
        }
    }

    #[test]
    fn every_signal_of_the_cri_has_a_number_and_comes_back() {
        for value in 1..=65 {
            let signal = Signal::try_from(value).expect("65 signals");
            let number = number(signal.as_str_name()).unwrap_or_else(|| panic!("{}", signal.as_str_name()));
            assert_eq!(self::number(wire(number).as_str_name()), Some(number));
        }
        assert_eq!(wire(15), Signal::Sigterm);
        assert_eq!(wire(17), Signal::Sigchld);
        assert_eq!(wire(0), Signal::RuntimeDefault);
    }
}

//! When a certificate is valid, read from its PEM file.

/// A certificate among the flags.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// Its file.
    pub file: String,
    /// From and until when, in seconds since 1970; `None` if the file holds none.
    pub valid: Option<(u64, u64)>,
}

/// Tags of the two kinds of time in DER, with the lengths that RFC 5280 prescribes.
const UTC_TIME: [u8; 2] = [0x17, 13];
const GENERALIZED_TIME: [u8; 2] = [0x18, 15];

/// Reads the validity of the first certificate of a PEM file.
///
/// The first two times in a certificate are its validity: what comes before them (version, serial number, algorithm, issuer) has none.
pub fn validity(pem: &str) -> Option<(u64, u64)> {
    let (_, rest) = pem.split_once("-----BEGIN CERTIFICATE-----")?;
    let (body, _) = rest.split_once("-----END CERTIFICATE-----")?;
    let der = base64(body)?;
    let mut times = (0..der.len()).filter_map(|at| time(der.get(at..)?));
    Some((times.next()?, times.next()?))
}

fn base64(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    let (mut word, mut bits) = (0u32, 0u32);
    for c in text
        .bytes()
        .filter(|c| !c.is_ascii_whitespace() && *c != b'=')
    {
        let six = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        word = word << 6 | u32::from(six);
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            out.push((word >> bits & 0xff) as u8);
        }
    }
    Some(out)
}

/// The time that these bytes begin with: `YYMMDDHHMMSSZ` or `YYYYMMDDHHMMSSZ`.
fn time(der: &[u8]) -> Option<u64> {
    let (tag, rest) = der.split_first_chunk::<2>()?;
    let text = std::str::from_utf8(rest.get(..usize::from(tag[1]))?).ok()?;
    let digits = text.strip_suffix('Z')?;
    if !digits.bytes().all(|c| c.is_ascii_digit()) {
        return None;
    }
    let (year, rest) = match *tag {
        UTC_TIME => {
            let (year, rest) = digits.split_at_checked(2)?;
            let year: u64 = year.parse().ok()?;
            (if year < 50 { 2000 + year } else { 1900 + year }, rest)
        }
        GENERALIZED_TIME => {
            let (year, rest) = digits.split_at_checked(4)?;
            (year.parse().ok()?, rest)
        }
        _ => return None,
    };
    let number = |at: usize| rest.get(at..at + 2)?.parse::<u64>().ok();
    let days = days_before(year, number(0)?, number(2)?)?;
    Some(((days * 24 + number(4)?) * 60 + number(6)?) * 60 + number(8)?)
}

/// Days from 1970-01-01 to a date.
fn days_before(year: u64, month: u64, day: u64) -> Option<u64> {
    const LENGTHS: [u64; 12] = [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let leap =
        |year: u64| year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400);
    let years: u64 = (1970..year).map(|year| 365 + u64::from(leap(year))).sum();
    let months: u64 = LENGTHS
        .iter()
        .take(usize::try_from(month.checked_sub(1)?).ok()?)
        .sum();
    let leap_day = u64::from(month > 2 && leap(year));
    Some(years + months + leap_day + day.checked_sub(1)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_counted_as_the_calendar_does() {
        assert_eq!(days_before(1970, 1, 1), Some(0));
        assert_eq!(days_before(2000, 3, 1), Some(11_017));
        assert_eq!(days_before(2026, 11, 21), Some(20_778));
    }

    #[test]
    fn times_are_read_in_both_forms() {
        let utc = [&UTC_TIME[..], b"240229120000Z"].concat();
        let general = [&GENERALIZED_TIME[..], b"20240229120000Z"].concat();
        assert_eq!(time(&utc), Some(1_709_208_000));
        assert_eq!(time(&utc), time(&general));
        assert_eq!(time(b"\x17\x0d240229"), None);
        assert_eq!(validity("nothing"), None);
    }
}

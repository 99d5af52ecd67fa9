// SPDX-License-Identifier: MIT OR Apache-2.0

//! As much of HTTP/1.1 (RFC 9112) as the control API needs: one request with a body of known
//! length, one reply, and the connection is closed. All waiting ends at a deadline.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Most bytes of a request's or reply's head.
const MAX_HEAD: usize = 8 << 10;
/// Most header lines.
const MAX_HEADERS: usize = 32;
/// Most bytes of a request's body.
pub(super) const MAX_BODY: usize = 64 << 10;

/// A stream on which everything together takes until a deadline at most.
pub(super) struct Deadline<'a> {
    stream: &'a UnixStream,
    end: Instant,
}

impl<'a> Deadline<'a> {
    pub(super) fn new(stream: &'a UnixStream, time: Duration) -> Self {
        Self {
            stream,
            end: Instant::now() + time,
        }
    }

    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(Some(left))
    }
}

impl Read for Deadline<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left()?)?;
        self.stream.read(buf)
    }
}

impl Write for Deadline<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        self.stream.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A request.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) method: String,
    /// Path, without a query.
    pub(super) path: String,
    pub(super) body: Vec<u8>,
}

/// Why there is no request.
#[derive(Debug, thiserror::Error)]
pub(super) enum RequestError {
    /// Nobody is there to get a reply.
    #[error("the client went away")]
    Gone,
    #[error("the request did not come in time")]
    Timeout,
    #[error("this is not an HTTP request: {0}")]
    Malformed(String),
    #[error("the head of the request is longer than {MAX_HEAD} bytes")]
    LongHead,
    #[error("the body of the request is longer than {MAX_BODY} bytes")]
    LongBody,
    #[error("send the body with a Content-Length, not with a Transfer-Encoding")]
    Encoding,
}

impl RequestError {
    /// The status of the reply.
    pub(super) fn status(&self) -> Status {
        match self {
            Self::Gone | Self::Malformed(_) => Status::BAD_REQUEST,
            Self::Timeout => Status::REQUEST_TIMEOUT,
            Self::LongHead => Status::HEAD_TOO_LARGE,
            Self::LongBody => Status::BODY_TOO_LARGE,
            Self::Encoding => Status::NOT_IMPLEMENTED,
        }
    }
}

impl From<io::Error> for RequestError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Self::Timeout,
            _ => Self::Gone,
        }
    }
}

fn malformed(what: impl ToString) -> RequestError {
    RequestError::Malformed(what.to_string())
}

/// The one value of a header. Two different ones are an error.
fn header<'a>(headers: &[httparse::Header<'a>], name: &str) -> Result<Option<&'a str>, String> {
    let mut values = headers
        .iter()
        .filter(|header| header.name.eq_ignore_ascii_case(name));
    let Some(first) = values.next() else {
        return Ok(None);
    };
    if values.any(|other| other.value != first.value) {
        return Err(format!("{name} is there twice"));
    }
    let text = str::from_utf8(first.value).map_err(|_| format!("{name} is not text"))?;
    Ok(Some(text.trim()))
}

fn content_length(headers: &[httparse::Header<'_>]) -> Result<Option<u64>, String> {
    let length = |text: &str| {
        // `parse` alone would take a plus sign.
        let digits = !text.is_empty() && text.bytes().all(|c| c.is_ascii_digit());
        let number = if digits { text.parse().ok() } else { None };
        number.ok_or_else(|| "Content-Length is not a number".to_owned())
    };
    header(headers, "Content-Length")?.map(length).transpose()
}

/// Reads a request.
pub(super) fn read_request(stream: &mut (impl Read + Write)) -> Result<Request, RequestError> {
    let mut bytes = Vec::new();
    let mut chunk = [0; 2048];
    loop {
        let count = match stream.read(&mut chunk) {
            Ok(0) => return Err(RequestError::Gone),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            result => result?,
        };
        bytes.extend_from_slice(chunk.get(..count).unwrap_or_default());
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut head = httparse::Request::new(&mut headers);
        let start = match head.parse(&bytes) {
            Ok(httparse::Status::Complete(start)) => start,
            Ok(httparse::Status::Partial) if bytes.len() < MAX_HEAD => continue,
            Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => {
                return Err(RequestError::LongHead);
            }
            Err(error) => return Err(malformed(error)),
        };
        let (Some(method), Some(target)) = (head.method, head.path) else {
            return Err(malformed("no method or path"));
        };
        if header(head.headers, "Transfer-Encoding")
            .map_err(malformed)?
            .is_some()
        {
            return Err(RequestError::Encoding);
        }
        let length = content_length(head.headers).map_err(malformed)?;
        let length = usize::try_from(length.unwrap_or(0)).unwrap_or(usize::MAX);
        if length > MAX_BODY {
            return Err(RequestError::LongBody);
        }
        let expects = header(head.headers, "Expect").map_err(malformed)?;
        let request = Request {
            method: method.to_owned(),
            path: target.split('?').next().unwrap_or_default().to_owned(),
            body: bytes.get(start..).unwrap_or_default().to_vec(),
        };
        if expects.is_some_and(|text| text.eq_ignore_ascii_case("100-continue")) {
            stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        return read_body(stream, request, length);
    }
}

/// Reads what is missing of the body.
fn read_body(
    stream: &mut impl Read,
    mut request: Request,
    length: usize,
) -> Result<Request, RequestError> {
    let missing = length.saturating_sub(request.body.len());
    stream
        .take(missing as u64)
        .read_to_end(&mut request.body)
        .map_err(RequestError::from)?;
    if request.body.len() < length {
        return Err(RequestError::Gone);
    }
    if request.body.len() > length {
        return Err(malformed("it is longer than its Content-Length"));
    }
    Ok(request)
}

/// A reply's status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Status(pub(super) u16, &'static str);

impl Status {
    pub(super) const OK: Self = Self(200, "OK");
    pub(super) const BAD_REQUEST: Self = Self(400, "Bad Request");
    pub(super) const NOT_FOUND: Self = Self(404, "Not Found");
    pub(super) const METHOD_NOT_ALLOWED: Self = Self(405, "Method Not Allowed");
    pub(super) const REQUEST_TIMEOUT: Self = Self(408, "Request Timeout");
    pub(super) const CONFLICT: Self = Self(409, "Conflict");
    pub(super) const BODY_TOO_LARGE: Self = Self(413, "Content Too Large");
    pub(super) const HEAD_TOO_LARGE: Self = Self(431, "Request Header Fields Too Large");
    pub(super) const INTERNAL: Self = Self(500, "Internal Server Error");
    pub(super) const NOT_IMPLEMENTED: Self = Self(501, "Not Implemented");
    pub(super) const UNAVAILABLE: Self = Self(503, "Service Unavailable");
}

/// The head of a reply; its body ends with the connection if no length is given.
pub(super) fn reply_head(status: Status, kind: &str, length: Option<usize>) -> String {
    let Status(code, reason) = status;
    let length = length.map_or_else(String::new, |n| format!("Content-Length: {n}\r\n"));
    format!(
        "HTTP/1.1 {code} {reason}\r\nContent-Type: {kind}\r\n{length}Cache-Control: no-store\r\nConnection: close\r\n\r\n"
    )
}

/// A whole reply.
pub(super) fn reply(status: Status, body: &serde_json::Value) -> Vec<u8> {
    let body = format!("{body}\n");
    let mut bytes = reply_head(status, "application/json", Some(body.len())).into_bytes();
    bytes.extend_from_slice(body.as_bytes());
    bytes
}

/// Reads a reply's head. Returns its status, the length of its body if it is known, and the part
/// of the body that has come already.
pub(super) fn read_reply_head(
    stream: &mut impl Read,
) -> Result<(u16, Option<u64>, Vec<u8>), String> {
    let mut bytes = Vec::new();
    let mut chunk = [0; 2048];
    loop {
        let count = match stream.read(&mut chunk) {
            Ok(0) => return Err("the host closed the connection".into()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err("the host does not answer".into());
            }
            result => result.map_err(|error| error.to_string())?,
        };
        bytes.extend_from_slice(chunk.get(..count).unwrap_or_default());
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut head = httparse::Response::new(&mut headers);
        match head.parse(&bytes) {
            Ok(httparse::Status::Complete(start)) => {
                let code = head.code.ok_or("the reply has no status")?;
                let length = content_length(head.headers)?;
                return Ok((code, length, bytes.split_off(start)));
            }
            Ok(httparse::Status::Partial) if bytes.len() < MAX_HEAD => {}
            Ok(httparse::Status::Partial) => return Err("the reply's head is too long".into()),
            Err(error) => return Err(format!("this is not HTTP: {error}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is read, and what was written.
    struct Wire<'a>(&'a [u8], Vec<u8>);

    impl Read for Wire<'_> {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            // In small pieces, as it may come.
            let count = self.0.len().min(buf.len()).min(7);
            let (now, later) = self.0.split_at(count);
            buf[..count].copy_from_slice(now);
            self.0 = later;
            Ok(count)
        }
    }

    impl Write for Wire<'_> {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            self.1.write(buf)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn read(text: &str) -> Result<Request, RequestError> {
        read_request(&mut Wire(text.as_bytes(), Vec::new()))
    }

    #[test]
    fn requests() {
        let get = read("GET /v1/status?x=1 HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        assert_eq!(
            (get.method.as_str(), get.path.as_str()),
            ("GET", "/v1/status")
        );
        let post =
            read("POST /v1/type HTTP/1.1\r\ncontent-length: 12\r\n\r\n{\"text\":\"a\"}").unwrap();
        assert_eq!(post.body, b"{\"text\":\"a\"}");
    }

    #[test]
    fn a_client_that_asks_before_it_sends_is_told_to_go_on() {
        let text = "POST /x HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n{}";
        let mut wire = Wire(text.as_bytes(), Vec::new());
        assert_eq!(read_request(&mut wire).unwrap().body, b"{}");
        assert_eq!(wire.1, b"HTTP/1.1 100 Continue\r\n\r\n");
    }

    #[test]
    fn bad_requests() {
        let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(MAX_HEAD));
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(99));
        let body = |length: &str| format!("POST / HTTP/1.1\r\n{length}\r\n\r\n{{}}");
        for (text, status) in [
            ("", 400),
            ("GET / HTTP/1.1\r\n", 400),
            ("hello\r\n\r\n", 400),
            ("{\"execute\":\"stop\"}\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\n\r\nmore", 400),
            (&long, 431),
            (&many, 431),
            (&body("Content-Length: 3"), 400),
            (&body("Content-Length: 1"), 400),
            (&body("Content-Length: -2"), 400),
            (&body("Content-Length: +2"), 400),
            (&body("Content-Length: 2\r\nContent-Length: 3"), 400),
            (&body("Content-Length: 65537"), 413),
            (&body("Content-Length: 99999999999999999999999"), 400),
            (&body("Transfer-Encoding: chunked"), 501),
        ] {
            let error = read(text).expect_err(text);
            assert_eq!(error.status().0, status, "{text}: {error}");
        }
    }

    #[test]
    fn a_slow_request_ends_at_the_deadline() {
        let (here, mut there) = UnixStream::pair().unwrap();
        there.write_all(b"GET / HT").unwrap();
        let mut stream = Deadline::new(&here, Duration::from_millis(30));
        assert!(matches!(
            read_request(&mut stream),
            Err(RequestError::Timeout)
        ));
    }

    #[test]
    fn replies() {
        let bytes = reply(Status::NOT_FOUND, &serde_json::json!({"error": "no"}));
        let mut wire = Wire(&bytes, Vec::new());
        let (code, length, mut body) = read_reply_head(&mut wire).unwrap();
        wire.read_to_end(&mut body).unwrap();
        assert_eq!((code, length), (404, Some(15)));
        assert_eq!(body, b"{\"error\":\"no\"}\n");
    }
}

// SPDX-License-Identifier: MIT OR Apache-2.0

//! The form of options such as `--disk` and `--net`: `key=value` items with commas between, as QEMU
//! has them.

/// Splits at single commas; a doubled comma stands for one.
pub(crate) fn split(text: &str) -> Vec<String> {
    let mut items = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' {
            if chars.peek() != Some(&',') {
                items.push(String::new());
                continue;
            }
            chars.next();
        }
        if let Some(item) = items.last_mut() {
            item.push(c);
        }
    }
    items
}

#[cfg(test)]
mod tests {
    use super::split;

    #[test]
    fn commas() {
        assert_eq!(split("a=1,b,,c=2,"), ["a=1", "b,c=2", ""]);
        assert_eq!(split(""), [""]);
        assert_eq!(split(",,,,"), [",,"]);
    }
}

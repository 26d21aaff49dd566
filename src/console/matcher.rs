//! Finds a text in a stream that comes in pieces of any size (Knuth, Morris, Pratt: "Fast Pattern Matching in
//! Strings", SIAM J. Comput. 6, 1977).

/// Looks for one text.
#[derive(Clone, Debug)]
pub struct Matcher {
    text: Vec<u8>,
    /// For each length of a matched prefix, the length of its longest proper suffix that is a prefix again.
    fallback: Vec<usize>,
    matched: usize,
}

impl Matcher {
    /// Looks for `text`; an empty one is never found.
    pub fn new(text: &[u8]) -> Matcher {
        let mut fallback = vec![0; text.len() + 1];
        let mut length = 0;
        for end in 1..text.len() {
            while length > 0 && text[end] != text[length] {
                length = fallback[length];
            }
            length += usize::from(text[end] == text[length]);
            fallback[end + 1] = length;
        }
        Matcher { text: text.to_vec(), fallback, matched: 0 }
    }

    /// Takes the next byte; true if it completes the text.
    pub fn feed(&mut self, byte: u8) -> bool {
        while self.matched > 0 && self.text.get(self.matched) != Some(&byte) {
            self.matched = self.fallback[self.matched];
        }
        self.matched += usize::from(self.text.get(self.matched) == Some(&byte));
        self.matched == self.text.len() && !self.text.is_empty()
    }

    /// The bytes fed last that may still be the beginning of the text.
    pub fn partial(&self) -> &[u8] {
        &self.text[..self.matched]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_exactly_what_a_search_finds() {
        let streams = ["", "a", "aab", "aaab", "ababac", "abababac", "login: login:", "xlogilogin: ", "aaaaaa"];
        let texts = ["a", "aab", "ababac", "login: ", "aaa", "", "zz"];
        for stream in streams {
            for text in texts {
                let mut matcher = Matcher::new(text.as_bytes());
                let found: Vec<usize> =
                    (1..=stream.len()).filter(|&end| matcher.feed(stream.as_bytes()[end - 1])).collect();
                let expected: Vec<usize> =
                    (1..=stream.len()).filter(|&end| !text.is_empty() && stream[..end].ends_with(text)).collect();
                assert_eq!(found, expected, "{text:?} in {stream:?}");
            }
        }
    }

    #[test]
    fn partial_is_the_longest_beginning() {
        let mut matcher = Matcher::new(b"ababac");
        for byte in b"xababab" {
            matcher.feed(*byte);
        }
        assert_eq!(matcher.partial(), b"abab");
    }
}

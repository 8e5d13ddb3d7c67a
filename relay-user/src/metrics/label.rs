//! Values of labels.

use std::{borrow::Cow, fmt, fmt::Write as _};

use prometheus_client::encoding::{EncodeLabelValue, LabelValueEncoder};

use crate::output::clean;

/// The value of a label, which may come from the network. The library writes values as they are, so it is
/// escaped here, as the text format of both Prometheus and OpenMetrics wants it.
#[derive(Clone, Debug)]
pub(super) struct Value<'a>(Cow<'a, str>);

impl<'a> From<&'a str> for Value<'a> {
    fn from(text: &'a str) -> Self {
        Self(clean(text))
    }
}

impl From<String> for Value<'_> {
    fn from(text: String) -> Self {
        Self(Cow::Owned(clean(&text).into_owned()))
    }
}

impl EncodeLabelValue for Value<'_> {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        for c in self.0.chars() {
            if matches!(c, '\\' | '"') {
                encoder.write_char('\\')?;
            }
            encoder.write_char(c)?;
        }
        Ok(())
    }
}

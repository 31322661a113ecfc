#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| freetumor_fuzz::recipe(bytes));

// The renderer of chat templates: white space, scopes, refusals and limits. Equality with Jinja on random templates is
// tested from Python.
#include <gtest/gtest.h>

#include <map>
#include <string>

#include "text/jinja/error.h"
#include "text/jinja/parser.h"
#include "text/jinja/render.h"

namespace mixtral::jinja {
namespace {

std::string rendered(const std::string& source) {
  const List messages = {Dict{{"role", "system"}, {"content", " a "}}, Dict{{"role", "user"}, {"content", "é\u2003"}}};
  try {
    return render(parse(source), {{"messages", messages}, {"bos_token", "<s>"}});
  } catch (const TemplateRefusal& refusal) {
    return std::string("refused: ") + refusal.what();
  } catch (const TemplateError& error) {
    return std::string("error: ") + error.what();
  }
}

TEST(Jinja, TrimsWhiteSpaceAroundTagsAsTransformersAsksIt) {
  EXPECT_EQ(rendered("a\n  {% if true %}\n  b\n  {% endif %}\nc\n"), "a\n  b\nc");
  EXPECT_EQ(rendered("a\n  {%+ if true +%}\nb{% endif %}"), "a\n  \nb");
  EXPECT_EQ(rendered("a \n {%- if true -%} \n b {%- endif %}\n\nc"), "ab\nc");
  EXPECT_EQ(rendered(" {{ 1 }}\n{{- 2 -}}\n 3"), " 123");
  EXPECT_EQ(rendered("a\n  {# b #}\nc {#- d -#} e"), "a\nce");
  EXPECT_EQ(rendered("a\r\nb\r\n"), "a\nb");
}

TEST(Jinja, ExpressionsAreThoseOfPython) {
  EXPECT_EQ(rendered("{{ -7 // 2 }} {{ -7 % 3 }} {{ 1 + 2 * 3 }} {{ 'a' ~ 1 ~ true ~ none }}"), "-4 2 7 a1TrueNone");
  EXPECT_EQ(rendered("{{ messages[0].content.strip() + '|' + messages[-1]['content'] | trim }}|"), "a|é|");
  EXPECT_EQ(rendered("{{ 'x' if missing is defined }}{{ missing }}{{ 'é日'[::-1] }}{{ 'é日' | length }}"), "日é2");
  EXPECT_EQ(rendered("{{ messages[1:][0].role }} {{ (1, 2)[5] is defined }} {{ not 'a' in 'bc' and 2 > 1 }}"),
            "user False True");
}

TEST(Jinja, VariablesOfALoopEndWithIt) {
  EXPECT_EQ(rendered("{% set x = 1 %}{% for m in messages %}{% set x = loop.index + 5 %}{{ x }}{% endfor %}{{ x }}"),
            "671");
  EXPECT_EQ(rendered("{% set n = namespace(x=1) %}{% for m in messages %}{% set n.x = n.x + 1 %}{% endfor %}{{ n.x }}"),
            "3");
  EXPECT_EQ(rendered("{% for m in messages if m.role == 'user' %}{{ loop.length }}{{ loop.last }}{% endfor %}"),
            "1True");
  EXPECT_EQ(rendered("{% for i in range(5) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}"), "012");
  EXPECT_EQ(rendered("{% for m in [] %}a{% else %}b{% endfor %}"), "b");
  EXPECT_EQ(
      rendered(
          "{% set x %}{{ bos_token }}a{% endset %}{{ x }}{% generation %}{% set x = 1 %}{% endgeneration %}{{ x }}"),
      "<s>a<s>a");
}

TEST(Jinja, WhatIsNotKnownIsRefusedByName) {
  EXPECT_EQ(rendered("\n{{ messages | tojson }}"), "error: line 2: the filter tojson is not supported");
  EXPECT_EQ(rendered("{% macro f(x) %}{{ x }}{% endmacro %}a"), "a");
  EXPECT_EQ(rendered("{% macro f(x) %}{{ x }}{% endmacro %}{{ f(1) }}"),
            "error: line 1: calling the macro f is not supported");
  EXPECT_EQ(rendered("{% if strftime_now is defined and cycler and not foo is defined %}a{% endif %}"), "a");
  EXPECT_EQ(rendered("{{ range }}"), "error: line 1: printing a namespace is not supported");
  EXPECT_EQ(rendered("{{ cycler(1) }}"), "error: line 1: calling cycler is not supported");
  EXPECT_EQ(rendered("{% include 'x' %}"), "error: line 1: the tag include is not supported");
  EXPECT_EQ(rendered("{{ messages }}"), "error: line 1: printing a list is not supported");
  EXPECT_EQ(rendered("{{ missing.x }}"), "error: line 1: \"x\" of an undefined value");
  EXPECT_EQ(rendered("{{ 'é' | upper }}"), "error: line 1: upper of text that is not ASCII is not supported");
  EXPECT_EQ(rendered("{{ raise_exception('no') }}"), "refused: no");
  for (const char* broken :
       {"{% if %}", "{{ 'a }}", "{{ 1", "{# a", "{% for x %}", "{% endif %}", "{% if true %}a", "{{ a b }}",
        "{% set x = %}", "{% break %}", "{{ x is defined if }}", "{{ (1 }}", "{{ [1, }}", "{{ a. }}"}) {
    EXPECT_EQ(rendered(broken).rfind("error: line 1: ", 0), 0u) << broken;
  }
}

TEST(Jinja, HostileTemplatesEndInAnError) {
  const auto ends = [](const std::string& source, const std::string& reason) {
    const std::string result = rendered(source);
    EXPECT_NE(result.find(reason), std::string::npos) << source.substr(0, 80) << " -> " << result.substr(0, 200);
  };
  ends("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more work");
  ends("{% set n = namespace(x='ab') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "16 MiB");
  ends(
      "{% set x %}{% for a in range(99999) %}aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa{% endfor %}{% endset %}"
      "{% for a in range(99) %}{{ x }}{% endfor %}",
      "16 MiB");
  ends(
      "{% set x = 'a' %}{% for a in range(9) %}{% set x = x | replace('a', 'aaaaaaaaaaaaaaaa') %}{{ x }}{% endfor %}"
      "{% set n = namespace(x='aa') %}{% for a in range(9) %}{% set n.x = n.x | replace('a', n.x) %}{% endfor %}",
      "16 MiB");
  ends("{% set n = namespace(x=[]) %}{% for a in range(99999) %}{% set n.x = [n.x] %}{% endfor %}", "not supported");
  ends("{% set n = namespace() %}{% set n.x = n %}", "not supported");
  ends("{{ range(100001) }}", "more than 100000");
  ends("{{ 99999999999 * 99999999999 }}", "not supported");
  std::string deep(100000, '('), chain = "{{ a", tests = "{% if a %}";
  for (int i = 0; i < 20000; ++i) {
    chain += " ~ a";
    tests += "{% elif a %}";
  }
  ends("{{ " + deep + "1" + std::string(100000, ')') + " }}", "nested too deeply");
  ends(chain + " }}", "nested too deeply");
  ends(tests + "{% endif %}", "nested too deeply");
}

}  // namespace
}  // namespace mixtral::jinja
